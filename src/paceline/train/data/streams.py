"""Loaders over data without indices, and over data that each rank divides itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from paceline.errors import ConfigError
from paceline.train import random_state
from paceline.train.data.batch_sizes import BatchSizeOf
from paceline.train.data.fingerprint import UNKNOWN, check_same, digest
from paceline.train.data.loader import ShardedLoader, mix
from paceline.train.data.sharding import busy_ranks, share
from paceline.types import Batch, Communicator, ReduceOp


class StreamLoader(ShardedLoader):
    """An IterableDataset: every rank reads the whole stream and keeps its share of each minibatch.

    The stream must be the same on every rank; it draws from a random stream that is. Resuming reads it again
    from the start of the epoch.
    """

    def __init__(
        self,
        source: DataLoader[Any],
        comm: Communicator,
        *,
        seed: int,
        per_worker: bool,
        batch_size_of: BatchSizeOf,
    ) -> None:
        super().__init__(source, comm, seed=seed)
        if source.batch_size is None and not per_worker and comm.size > 1:
            raise ConfigError(
                "batch='global' cannot divide batches that the data set makes (batch_size=None): give the"
                " DataLoader a batch_size, or prepare it with batch='per_worker', one batch per rank"
            )
        round_size = (
            None if source.batch_size is None else source.batch_size * (comm.size if per_worker else 1)
        )
        self._stream = _Share(
            source.dataset, comm.rank, comm.size, round_size, source.drop_last, batch_size_of
        )
        self._round_size = round_size or 0
        self._unit = round_size or comm.size
        self._facts = UNKNOWN  # of the first round
        self.on_trained = self._compare

    def __len__(self) -> int:
        """Minibatches of a pass; TypeError, as from the original, if the data set has no length."""
        count = len(self.source.dataset)  # type: ignore[arg-type]
        size = self._round_size or self._comm.size
        full, rest = divmod(count - self._offset, size)
        return full + bool(rest and not (self.source.drop_last and self._round_size))

    def _batches(self, number: int, start: int) -> Iterator[tuple[Any, int, int, bool]]:
        common = mix(self._seed, number, -2)
        self._stream.skip = self._offset
        loader = self._inner(
            self._stream,
            torch.Generator().manual_seed(common),
            batch_size=None,
            collate_fn=_Collate(self.source.collate_fn),
            persistent_workers=False,  # a pass has its own iterator
        )
        random = random_state.SeparateStream(common)
        with random.drawing():
            items = iter(loader)
            for _ in range(start):
                next(items, None)

        def fetched() -> Any:
            with random.drawing():
                return next(items, None)

        looks_ahead = self.source.num_workers > 1  # each knows its own last minibatch only
        item = fetched()
        while item is not None:
            following = fetched() if looks_ahead else None
            batch, own, total, is_last, facts = item
            if facts:
                self._facts = facts
            yield batch, own, total, following is None if looks_ahead else is_last
            item = following if looks_ahead else fetched()

    def _why_not_other_steps(self) -> str:
        if self.source.num_workers <= 1:
            return ""
        return "several workers, each with a stream of its own, cannot continue"

    def _compare(self) -> None:
        check_same(
            "the first minibatch of the stream",
            self._facts,
            self._comm,
            "Seed the data set's own generator alike on all ranks, or divide the stream in the data set and"
            " prepare the loader with shard=False",
        )


class OwnLoader(ShardedLoader):
    """Data that each rank divides itself (`shard=False`); ranks may have different numbers of batches.

    A rank that runs out first repeats its last batch with weight 0 until all have finished, so that every
    rank makes the same steps and every sample counts once. Each pass draws from a random stream of its own,
    which a resumed one begins again.
    """

    def __init__(
        self, source: DataLoader[Any], comm: Communicator, *, seed: int, batch_size_of: BatchSizeOf
    ) -> None:
        super().__init__(source, comm, seed=seed)
        self._batch_size_of = batch_size_of
        self._unit = source.batch_size or 1
        self._length = _longest(source, comm)
        self._drawn = 0  # the seed of the pass in progress
        self._generator_state: torch.Tensor | None = None  # of the user's generator, where it began
        self._before: Batch = None  # the last batch that a resumed pass leaves out

    @property
    def local_batch_size(self) -> int:
        return self.source.batch_size or 0

    def __len__(self) -> int:
        """Minibatches of a pass: those of the rank that has most; TypeError if a rank's have no number."""
        if self._length is None:
            raise TypeError("the DataLoader of a rank (shard=False) has no length")
        return self._length

    def state_dict(self) -> dict[str, Any]:
        """Position, and where the pass' random numbers began."""
        return {**super().state_dict(), "drawn": self._drawn, "generator": self._generator_state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a position."""
        super().load_state_dict(state)
        self._drawn, self._generator_state = state["drawn"], state["generator"]

    def _why_not_other_steps(self) -> str:
        return "ranks that divide the data themselves (shard=False) cannot continue"

    def load_elsewhere(self, state: dict[str, Any]) -> None:
        """Only between epochs: a rank's own data is not known to the others."""
        self.load_state_dict({**state, "unit": 0})

    def _pass_begins(self) -> None:
        generator = self.source.generator
        self._drawn = int(torch.randint(2**62, ()))
        self._generator_state = None if generator is None else generator.get_state()

    def _items(self, start: int) -> Iterator[Batch]:
        generator = self.source.generator
        if start == 0:
            self._pass_begins()
        elif generator is not None and self._generator_state is not None:
            generator.set_state(self._generator_state)
        random = random_state.SeparateStream(self._drawn)
        with random.drawing():
            items = iter(self.source)
            self._before = None
            for _ in range(start):
                self._before = next(items, self._before)
        while True:
            with random.drawing():
                batch = next(items, self)
            if batch is self:
                return
            yield batch

    def _batches(self, number: int, start: int) -> Iterator[tuple[Any, int, int, bool]]:
        items = self._items(start)
        upcoming = next(items, self)
        batch = self._before  # of a rank that had run out before the resumption
        while True:
            own = 0 if upcoming is self else self._batch_size_of(upcoming)
            following = self if upcoming is self else next(items, self)
            # One small message per step: how many samples, and who has more after this batch.
            totals = torch.tensor([own, following is not self], dtype=torch.int64)
            with self.meeting():
                self._comm.all_reduce(totals).wait()
            total, more = totals.tolist()
            if total == 0:
                return
            if upcoming is not self:
                batch = upcoming
            if batch is None:
                raise ConfigError(
                    f"rank {self._comm.rank} got no batch at all while others did (shard=False)"
                )
            yield batch, own, total, more == 0
            if more == 0:
                return
            upcoming = following


def _longest(source: DataLoader[Any], comm: Communicator) -> int | None:
    """The largest number of batches that a rank's loader has; None if one has no number. Collective."""
    try:
        own = len(source)
    except TypeError:
        own = -1
    bounds = torch.tensor([own, -own], dtype=torch.int64)
    comm.all_reduce(bounds, op=ReduceOp.MAX).wait()
    most, least = int(bounds[0]), -int(bounds[1])
    return None if least < 0 else most


class _Collate:
    """The user's collate function, applied to the samples of a share."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self._collate = collate

    def __call__(self, item: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._collate(item[0]), *item[1:])


class _Share(IterableDataset):
    """One rank's share of a stream: (samples, own count, all ranks' count, is last, facts of round 0)."""

    def __init__(
        self,
        dataset: Any,
        rank: int,
        size: int,
        round_size: int | None,
        drop_last: bool,
        batch_size_of: BatchSizeOf,
    ) -> None:
        self._dataset, self._rank, self._size = dataset, rank, size
        self._round_size, self._drop_last, self._batch_size_of = round_size, drop_last, batch_size_of
        self.skip = 0
        """Samples, or ready batches, that are read and left out at the beginning."""

    def __iter__(self) -> Iterator[tuple[Any, int, int, bool, int]]:
        if self._round_size is None:
            yield from self._ready_batches()
            return
        repeated: list[Any] = []
        for number, (samples, is_last) in enumerate(self._rounds(self._round_size)):
            count = len(samples)
            busy = self._size if count == self._round_size else busy_ranks(count, self._size)
            low, high = share(count, self._rank, busy)
            # A rank without samples loads earlier ones, which count for nothing.
            repeated = samples[low:high] or repeated or samples
            yield repeated, high - low, count, is_last, 0 if number else digest(samples)

    def _rounds(self, round_size: int) -> Iterator[tuple[list[Any], bool]]:
        """The samples of all ranks, minibatch after minibatch, and whether it is the last."""
        full: list[Any] = []
        held: list[Any] = []
        for sample in itertools.islice(self._dataset, self.skip, None):
            if full and not self._drop_last:
                yield full, False
                full = []
            held.append(sample)
            if len(held) == round_size:
                if full:
                    yield full, False
                full, held = held, []
        rest = [] if self._drop_last else held
        if full:
            yield full, not rest
        if rest:
            yield rest, True

    def _ready_batches(self) -> Iterator[tuple[Any, int, int, bool, int]]:
        held: list[Any] = []
        facts = 0
        is_first = True
        for batch in itertools.islice(self._dataset, self.skip, None):
            if len(held) == self._size:
                facts, is_first = digest(held) if is_first else 0, False
                yield self._ready(held, is_last=False, facts=facts)
                held = []
            held.append(batch)
        if held:
            yield self._ready(held, is_last=True, facts=digest(held) if is_first else 0)

    def _ready(self, held: list[Any], *, is_last: bool, facts: int) -> tuple[Any, int, int, bool, int]:
        """Ranks without a batch of their own repeat one, with weight 0."""
        sizes = [self._batch_size_of(batch) for batch in held]
        rank = self._rank
        own = sizes[rank] if rank < len(held) else 0
        return held[rank % len(held)], own, sum(sizes), is_last, facts
