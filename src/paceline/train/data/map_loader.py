"""The loader over a data set with indices: the order of the epoch, and this rank's part of each round."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, SequentialSampler

from paceline.errors import ConfigError
from paceline.train.data.loader import ShardedLoader, mix
from paceline.train.data.sharding import BatchRounds, OrderedRounds, Rounds
from paceline.types import Communicator


class MapLoader(ShardedLoader):
    """A dataset with indices. The order is drawn from (seed, epoch), the same for any number of ranks."""

    def __init__(self, source: DataLoader[Any], comm: Communicator, *, seed: int, per_worker: bool) -> None:
        super().__init__(source, comm, seed=seed)
        self._per_worker = per_worker
        self._drawn: torch.Tensor | None = None  # this epoch's order of a custom sampler, flattened
        self._lengths: torch.Tensor | None = None
        self._rounds: Rounds | None = None
        self._choice = _Choice()
        self._loader: DataLoader[Any] | None = None
        if source.batch_size is None and source.batch_sampler is None:
            raise ConfigError(
                "a DataLoader with batch_size=None over a dataset with indices cannot be sharded;"
                " give it a batch_size, or a batch_sampler"
            )
        self._has_batch_sampler = source.batch_size is None
        if not self._has_batch_sampler:
            assert source.batch_size is not None
            self._round_size = source.batch_size * (comm.size if per_worker else 1)
            if self._round_size < comm.size:
                raise ConfigError(
                    f"a global batch of {source.batch_size} samples cannot be divided over {comm.size}"
                    " workers"
                )
            self._plan()  # bad sizes are errors now, not after the first epoch began

    def __len__(self) -> int:
        return len(self._rounds if self._rounds is not None else self._plan())

    def state_dict(self) -> dict[str, Any]:
        """Position, and the order that a custom sampler drew (it could not be drawn again)."""
        return {**super().state_dict(), "drawn": self._drawn, "lengths": self._lengths}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a position."""
        super().load_state_dict(state)
        self._drawn, self._lengths = state["drawn"], state["lengths"]
        self._rounds = None

    def _batches(self, start: int) -> Iterator[tuple[Any, int, int, bool]]:
        rounds = self._plan(redraw=start == 0)
        # Workers draw their augmentations from a stream that begins with the epoch: replay it.
        replayed = start if self.source.num_workers else 0
        self._choice.set(rounds, start - replayed)
        if self._loader is None:
            self._loader = self._inner(self.dataset, batch_sampler=self._choice)
        batches = iter(self._loader)
        for _ in range(replayed):
            next(batches)
        for index in range(start, len(rounds)):
            own, total = len(rounds.local(index)), rounds.total(index)
            yield next(batches), own, total, index == len(rounds) - 1

    def _plan(self, *, redraw: bool = False) -> Rounds:
        rank, size, source = self._comm.rank, self._comm.size, self.source
        if self._has_batch_sampler:
            if self._drawn is None or redraw:
                sampler: Any = source.batch_sampler
                self._draw([list(batch) for batch in sampler] if rank == 0 else [])
            assert self._drawn is not None and self._lengths is not None
            batches = [part.tolist() for part in torch.split(self._drawn, self._lengths.tolist())]
            self._rounds = BatchRounds(batches, rank, size, whole=self._per_worker)
        else:
            order = self._order(redraw)
            self._rounds = OrderedRounds(order, self._round_size, rank, size, drop_last=source.drop_last)
        return self._rounds

    def _order(self, redraw: bool) -> torch.Tensor:
        count, sampler = len(self.dataset), self.source.sampler  # type: ignore[arg-type]
        if isinstance(sampler, SequentialSampler):
            return torch.arange(count)
        if isinstance(sampler, RandomSampler) and not sampler.replacement and sampler.num_samples == count:
            return self._permutation(count)
        if isinstance(sampler, DistributedSampler):  # it would pad; take its wishes, not its shards
            return self._permutation(count) if sampler.shuffle else torch.arange(count)
        if self._drawn is None or redraw:
            self._draw([[i] for i in sampler] if self._comm.rank == 0 else [])
        assert self._drawn is not None
        return self._drawn

    def _permutation(self, count: int) -> torch.Tensor:
        generator = torch.Generator()
        generator.manual_seed(mix(self._seed, self.epoch, -1))
        return torch.randperm(count, generator=generator)

    def _draw(self, batches: list[list[Any]]) -> None:
        """Rank 0's sampler decides; the others receive its indices."""
        flat = [i for batch in batches for i in batch]
        if any(not isinstance(i, int) for i in flat):
            raise ConfigError(
                f"the sampler yields {type(flat[0]).__name__}, not whole numbers; such samplers cannot be"
                " sharded. Shard inside the dataset and pass shard=False to prepare()"
            )
        sizes = torch.tensor([len(flat), len(batches)])
        self._comm.broadcast(sizes).wait()
        drawn, lengths = (
            torch.empty(int(sizes[0]), dtype=torch.int64),
            torch.empty(int(sizes[1]), dtype=torch.int64),
        )
        if self._comm.rank == 0:
            drawn, lengths = torch.tensor(flat, dtype=torch.int64), torch.tensor([len(b) for b in batches])
        self._comm.broadcast(drawn).wait()
        self._comm.broadcast(lengths).wait()
        self._drawn, self._lengths = drawn, lengths


class _Choice(BatchSampler):
    """The inner loader's batch sampler: this rank's part of the current epoch."""

    def __init__(self) -> None:
        self._rounds: Rounds | None = None
        self._start = 0

    def set(self, rounds: Rounds, start: int) -> None:
        self._rounds, self._start = rounds, start

    def __iter__(self) -> Iterator[list[int]]:
        assert self._rounds is not None
        for index in range(self._start, len(self._rounds)):
            yield self._rounds.local(index)

    def __len__(self) -> int:
        return 0 if self._rounds is None else len(self._rounds) - self._start
