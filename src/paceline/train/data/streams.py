"""Loaders over data without indices, and over data that each rank divides itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from paceline.errors import ConfigError
from paceline.train import random_state
from paceline.train.data.loader import ShardedLoader
from paceline.train.data.sharding import share
from paceline.types import Batch, Communicator


class StreamLoader(ShardedLoader):
    """An IterableDataset: every rank reads the whole stream and keeps its share of each minibatch.

    The stream must be the same on every rank. Resuming reads it again from the start of the epoch.
    """

    def __init__(self, source: DataLoader[Any], comm: Communicator, *, seed: int) -> None:
        super().__init__(source, comm, seed=seed)
        batch_size = source.batch_size
        stream = _Share(source.dataset, comm.rank, comm.size, batch_size, source.drop_last)
        self._loader = self._inner(stream, batch_size=None, collate_fn=_Collate(source.collate_fn))
        self._random = random_state.capture()

    def _batches(self, start: int) -> Iterator[tuple[Any, int, int, bool]]:
        now = random_state.capture()
        if start:
            random_state.restore(self._random)
        else:
            self._random = now
        items = iter(self._loader)
        for _ in range(start):
            next(items)
        if start:
            random_state.restore(now)
        single = self.source.num_workers <= 1  # of several workers' streams the last end is not known
        for batch, own, total, is_last in items:
            yield batch, own, total, is_last and single

    def state_dict(self) -> dict[str, Any]:
        """Position, and the random state at the start of the epoch."""
        return {**super().state_dict(), "random": self._random}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a position."""
        super().load_state_dict(state)
        self._random = state["random"]


class OwnLoader(ShardedLoader):
    """Data that each rank divides itself (`shard=False`); ranks may have different numbers of batches.

    A rank that runs out first repeats its last batch with weight 0 until all have finished, so that every
    rank makes the same steps and every sample counts once.
    """

    def __init__(self, source: DataLoader[Any], comm: Communicator, *, seed: int) -> None:
        super().__init__(source, comm, seed=seed)
        self._iterated = source

    def _batches(self, start: int) -> Iterator[tuple[Any, int, int, bool]]:
        items = iter(self.source)
        for _ in range(start):
            next(items)
        batch: Batch = None
        upcoming = next(items, None)
        while True:
            own = 0 if upcoming is None else count_samples(upcoming)
            following = None if upcoming is None else next(items, None)
            # One small message per step: how many samples, and who has more after this batch.
            totals = torch.tensor([own, following is not None], dtype=torch.int64)
            self._comm.all_reduce(totals).wait()
            total, more = totals.tolist()
            if total == 0:
                return
            if upcoming is not None:
                batch = upcoming
            if batch is None:
                raise ConfigError(
                    f"rank {self._comm.rank} got no batch at all while others did (shard=False)"
                )
            yield batch, own, total, more == 0
            if more == 0:
                return
            upcoming = following


def count_samples(batch: Batch) -> int:
    """Length of the first tensor in a batch; 1 when there is none."""
    if isinstance(batch, torch.Tensor):
        return len(batch) if batch.ndim else 1
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        for part in batch:
            if isinstance(part, (torch.Tensor, Mapping, Sequence)) and not isinstance(part, str):
                return count_samples(part)
    return 1


class _Collate:
    """The user's collate function, applied to the samples of a share."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self._collate = collate

    def __call__(self, item: tuple[Any, int, int, bool]) -> tuple[Any, int, int, bool]:
        return (self._collate(item[0]), *item[1:])


class _Share(IterableDataset):
    """One rank's share of a stream: yields (samples, own count, all ranks' count, is last)."""

    def __init__(self, dataset: Any, rank: int, size: int, batch_size: int | None, drop_last: bool) -> None:
        self._dataset, self._rank, self._size = dataset, rank, size
        self._batch_size, self._drop_last = batch_size, drop_last

    def __iter__(self) -> Iterator[tuple[Any, int, int, bool]]:
        return self._ready_batches() if self._batch_size is None else self._samples(self._batch_size)

    def _samples(self, batch_size: int) -> Iterator[tuple[Any, int, int, bool]]:
        round_size = batch_size * self._size
        held: list[Any] = []
        for sample in self._dataset:
            held.append(sample)
            # Continue only when enough is left for every rank: a shorter remainder joins this round.
            if len(held) == round_size + self._size:
                yield self._part(held[:round_size], is_last=False)
                del held[:round_size]
        if self._drop_last:
            del held[len(held) // round_size * round_size :]
        if held and len(held) < self._size:
            raise ConfigError(f"a stream of {len(held)} samples cannot be divided over {self._size} workers")
        if held:
            yield self._part(held, is_last=True)

    def _part(self, samples: list[Any], *, is_last: bool) -> tuple[Any, int, int, bool]:
        low, high = share(len(samples), self._rank, self._size)
        return samples[low:high], high - low, len(samples), is_last

    def _ready_batches(self) -> Iterator[tuple[Any, int, int, bool]]:
        held: list[Any] = []
        for batch in self._dataset:
            if len(held) == self._size:
                yield held[self._rank], 1, self._size, False
                held = []
            held.append(batch)
        if held:  # ranks without a batch of their own repeat one, with weight 0
            rank, count = self._rank, len(held)
            yield held[rank % count], int(rank < count), count, True
