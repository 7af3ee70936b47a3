"""The loader over a data set with indices: the order of the epoch, and this rank's part of each round."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from paceline.errors import ConfigError
from paceline.train import plain
from paceline.train.data.loader import ShardedLoader, mix
from paceline.train.data.sharding import (
    BatchRounds,
    OrderedRounds,
    Rounds,
    divides_itself,
    finite,
    is_distributed,
    plain_key,
)
from paceline.types import Communicator


class MapLoader(ShardedLoader):
    """A dataset with indices. The order is drawn from (seed, epoch), the same for any number of ranks."""

    def __init__(self, source: DataLoader[Any], comm: Communicator, *, seed: int, per_worker: bool) -> None:
        super().__init__(source, comm, seed=seed)
        self._per_worker = per_worker
        self._drawn: torch.Tensor | None = None  # the order that a custom sampler drew last, flattened
        self._lengths: torch.Tensor | None = None
        self._is_new = False  # whether the pass that begins at a later batch draws its own order
        self._drawn_for: list[Any] = []  # the pass that it is for, and the sampler's own epoch
        self._rounds: Rounds | None = None
        self._kept: tuple[DataLoader[Any], _Choice, torch.Generator] | None = None  # with persistent workers
        self._is_kept_busy = False
        if source.batch_size is None and source.batch_sampler is None:
            raise ConfigError(
                "a DataLoader with batch_size=None over a dataset with indices cannot be sharded;"
                " give it a batch_size, or a batch_sampler"
            )
        self._sampler: Any = source.sampler
        self._sampler_epoch = 0
        self._has_batch_sampler = source.batch_size is None
        round_size, self._drop_last = source.batch_size, source.drop_last
        if self._has_batch_sampler:
            batches: Any = source.batch_sampler
            self._sampler = batches
            if type(batches) is BatchSampler and is_distributed(batches.sampler):  # it gives shares
                self._has_batch_sampler, self._sampler = False, batches.sampler
                round_size, self._drop_last = batches.batch_size, batches.drop_last
        if divides_itself(self._sampler):
            raise ConfigError(
                f"{type(self._sampler).__name__} gives each rank a share by its own rules: prepare the"
                " loader with job.prepare(…, shard=False), or without that sampler"
            )
        self._sampler_epoch = getattr(self._sampler, "epoch", 0)
        self._round_size = (round_size or 0) * (comm.size if per_worker else 1)
        self._unit = self._round_size or (comm.size if per_worker else 1)
        self._plan(0)  # bad sizes are errors now, not after the first epoch began

    def __len__(self) -> int:
        return len(self._rounds if self._rounds is not None else self._plan(self._next))

    def state_dict(self) -> dict[str, Any]:
        """Position, and the order that a custom sampler drew (it could not be drawn again)."""
        drawn = {"drawn": self._drawn, "lengths": self._lengths, "drawn_for": list(self._drawn_for)}
        return {**super().state_dict(), **drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a position."""
        super().load_state_dict(state)
        self._drawn, self._lengths = state["drawn"], state["lengths"]
        self._drawn_for = list(state["drawn_for"])
        self._rounds = None
        self._is_new = False

    def _pass_begins(self) -> None:
        self._is_new = True

    def _batches(self, number: int, start: int) -> Iterator[tuple[Any, int, int, bool]]:
        begins_later = start > 0 or self._offset > 0
        is_resumed, self._is_new = begins_later and not self._is_new, False
        if begins_later and self._offset + start * self._unit >= self._num_units(
            number, is_resumed=is_resumed
        ):
            return  # all was trained before it was saved, or is skipped
        rounds = self._plan(number, is_resumed=is_resumed)
        # Workers draw their augmentations from a stream that begins with the epoch: replay it.
        replayed = start if self.source.num_workers else 0
        is_kept = bool(self.source.persistent_workers) and not self._is_kept_busy
        inner, choice, generator = self._loader(is_kept=is_kept)
        choice.set(rounds, start - replayed)
        generator.manual_seed(mix(self._seed, number, self._comm.rank))
        self._is_kept_busy = self._is_kept_busy or is_kept
        try:
            batches = iter(inner)
            for _ in range(replayed):
                next(batches)
            for index in range(start, len(rounds)):
                own, total = len(rounds.own(index)), rounds.total(index)
                yield next(batches), own, total, index == len(rounds) - 1
        finally:
            if is_kept:
                self._is_kept_busy = False

    def _loader(self, *, is_kept: bool) -> tuple[DataLoader[Any], _Choice, torch.Generator]:
        """A loader for one pass; the one with the persistent workers, unless it serves another pass."""
        if is_kept and self._kept is not None:
            return self._kept
        choice, generator = _Choice(), torch.Generator()
        different: dict[str, Any] = {"batch_sampler": choice}
        if not is_kept:
            different["persistent_workers"] = False
        made = self._inner(self.source.dataset, generator, **different), choice, generator
        if is_kept:
            self._kept = made
        return made

    def _plan(self, number: int, *, is_resumed: bool = False) -> Rounds:
        rank, size = self._comm.rank, self._comm.size
        order = self._order(number, is_resumed=is_resumed)
        if self._has_batch_sampler:
            assert self._lengths is not None
            batches = [part.tolist() for part in torch.split(order, self._lengths.tolist())][self._offset :]
            self._rounds = BatchRounds(batches, rank, size, whole=self._per_worker)
        else:
            self._rounds = OrderedRounds(
                order[self._offset :], self._round_size, rank, size, drop_last=self._drop_last
            )
        return self._rounds

    def _num_units(self, number: int, *, is_resumed: bool) -> int:
        order = self._order(number, is_resumed=is_resumed)
        return order.numel() if self._lengths is None or not self._has_batch_sampler else len(self._lengths)

    def _order(self, number: int, *, is_resumed: bool) -> torch.Tensor:
        count, sampler = len(self.source.dataset), self._sampler  # type: ignore[arg-type]
        if type(sampler) is SequentialSampler:
            return torch.arange(count)
        if type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == count:
            return self._permutation(number, count)
        if is_distributed(sampler):  # it would pad; take its wishes, not its shards
            if not sampler.shuffle:
                return torch.arange(count)
            if sampler.epoch != self._sampler_epoch:
                self._sampler_epoch = -1  # the user calls set_epoch: it says which order
            return self._permutation(sampler.epoch if self._sampler_epoch == -1 else number, count)
        # Drawn once per pass: a rank that only looks at a batch draws nothing, the others need not be there.
        wanted = [number, getattr(sampler, "epoch", None)]
        if self._drawn is None or (wanted != self._drawn_for and not is_resumed):
            self._draw()
            self._drawn_for = wanted
        assert self._drawn is not None
        return self._drawn

    def _permutation(self, number: int, count: int) -> torch.Tensor:
        generator = torch.Generator()
        generator.manual_seed(mix(self._seed, number, -1))
        return torch.randperm(count, generator=generator)

    def _draw(self) -> None:
        """Rank 0's sampler decides; the others receive its indices, or its error."""
        flat: Any = array("q")  # eight bytes for each index: samplers may be huge
        lengths: list[int] = []
        error = None
        if self._comm.rank == 0:
            try:
                for item in finite(self._sampler, len(self.source.dataset)):  # type: ignore[arg-type]
                    batch = plain_key(list(item) if self._has_batch_sampler else [item])
                    flat.extend(batch)
                    lengths.append(len(batch))
            except TypeError as unknown:
                error = (
                    f"the sampler gives other things than whole numbers ({unknown}); such samplers cannot be"
                    " sharded. Shard inside the dataset and pass shard=False to prepare()"
                )
            except ConfigError as endless:
                error = str(endless)
        if error is not None:
            flat, lengths = array("q"), []
        indices = torch.frombuffer(flat, dtype=torch.int64) if flat else torch.empty(0, dtype=torch.int64)
        facts: list[Any] = [indices, torch.tensor(lengths, dtype=torch.int64), error]
        if self._comm.size > 1:
            facts = plain.broadcast(facts, self._comm)
        self._drawn, self._lengths, error = facts
        if error is not None:
            raise ConfigError(error)


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
            yield self._rounds.batch(index)

    def __len__(self) -> int:
        return 0 if self._rounds is None else len(self._rounds) - self._start
