"""Which samples a rank trains on: pure arithmetic, the same on every rank.

An epoch is a list of rounds, one per minibatch: as many as one process would make. A round's samples are
divided over the ranks as evenly as possible, the first ranks taking one more. In a round with fewer samples
than ranks, the others get a batch that they have had before, which counts for nothing: all ranks make the
same number of steps, and no sample is trained twice.
"""

from __future__ import annotations

import abc
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import BatchSampler, DistributedSampler

from paceline.errors import ConfigError

_UNENDING = 1_000_000
"""Indices beyond those of ten epochs, after which a sampler is taken to be endless."""


def busy_ranks(count: int, size: int) -> int:
    """On how many ranks a short round of `count` samples is spent: two or more each, for BatchNorm."""
    return min(size, max(1, count // 2))


def share(count: int, rank: int, size: int) -> tuple[int, int]:
    """Half-open range of `count` things that belongs to `rank` of `size`; empty for ranks above."""
    if rank >= size:
        return count, count
    base, extra = divmod(count, size)
    start = rank * base + min(rank, extra)
    return start, start + base + (rank < extra)


def number_of_rounds(count: int, size: int, *, drop_last: bool) -> int:
    """How many minibatches of `size` there are in `count` things; the last may be short, or is dropped."""
    full, rest = divmod(max(0, count), size)
    return full + bool(rest and not drop_last)


def is_distributed(sampler: Any) -> bool:
    """Whether it is torch's DistributedSampler, of which only the wishes are taken: shuffle or not."""
    return type(sampler) is DistributedSampler


def divides_itself(sampler: Any) -> bool:
    """Whether a sampler, or the one inside a batch sampler, gives each rank a share by rules of its own."""
    inner = getattr(sampler, "sampler", None)
    if is_distributed(sampler) or (type(sampler) is BatchSampler and is_distributed(inner)):
        return False
    return any(getattr(one, "num_replicas", 1) not in (1, None) for one in (sampler, inner))


def finite(sampler: Any, count: int) -> Iterator[Any]:
    """What a sampler over `count` samples gives.

    Raises:
        ConfigError: It does not say how much, and gives many times the data set.
    """
    try:
        most = math.inf if len(sampler) >= 0 else 0
    except TypeError:
        most = 10 * count + _UNENDING
    given = 0
    for one in sampler:
        given += len(one) if isinstance(one, (list, tuple)) else 1
        if given > most:
            raise ConfigError(
                f"the sampler {type(sampler).__name__} has no length, and has given {given} indices for"
                f" {count} samples: an epoch must end. Give it a length, such as RandomSampler(data,"
                " replacement=True, num_samples=…), or make an IterableDataset of it"
            )
        yield one


def plain_key(one: Any) -> Any:
    """NumPy's and torch's whole numbers as Python's; strings and tuples as they are."""
    if isinstance(one, str):
        return one
    if isinstance(one, (list, tuple)):
        return type(one)(plain_key(part) for part in one)
    if getattr(one, "ndim", 0) == 1:
        return [plain_key(part) for part in one]
    try:
        return operator.index(one)
    except TypeError:
        raise TypeError(f"it yields {type(one).__name__}; whole numbers, strings or lists expected") from None


class Rounds(abc.ABC):
    """The minibatches of one epoch, seen from one rank."""

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def own(self, index: int) -> list[int]:
        """Sample indices of this rank in round `index`; perhaps none."""

    def batch(self, index: int) -> list[int]:
        """What this rank loads in round `index`: its own samples, or others that count for nothing."""
        for earlier in range(index, -1, -1):
            if own := self.own(earlier):
                return own
        return self.everyone(index)

    @abc.abstractmethod
    def everyone(self, index: int) -> list[int]:
        """Sample indices of all ranks in round `index`."""

    @abc.abstractmethod
    def total(self, index: int) -> int:
        """Number of samples of all ranks in round `index`."""


class OrderedRounds(Rounds):
    """Rounds of `round_size` consecutive samples of an order."""

    def __init__(
        self, order: torch.Tensor, round_size: int, rank: int, size: int, *, drop_last: bool
    ) -> None:
        count = order.numel()
        if not count:
            raise ConfigError("the data set has no samples, or its sampler gives none")
        full = number_of_rounds(count, round_size, drop_last=drop_last)
        count = min(count, full * round_size)
        if not full:
            raise ConfigError(
                f"{order.numel()} samples make no full batch of {round_size} over all workers and"
                " drop_last=True drops them all; use a smaller batch size"
            )
        self._order, self._round_size, self._rank, self._size = order, round_size, rank, size
        self._count, self._rounds = count, full

    def __len__(self) -> int:
        return self._rounds

    def _range(self, index: int) -> tuple[int, int]:
        start = index * self._round_size
        return start, self._count if index == self._rounds - 1 else start + self._round_size

    def own(self, index: int) -> list[int]:
        """This rank's sample indices in round `index`."""
        start, stop = self._range(index)
        is_short = stop - start < self._round_size
        size = busy_ranks(stop - start, self._size) if is_short else self._size
        low, high = share(stop - start, self._rank, size)
        chosen: list[int] = self._order[start + low : start + high].tolist()
        return chosen

    def everyone(self, index: int) -> list[int]:
        """All sample indices of round `index`."""
        start, stop = self._range(index)
        every: list[int] = self._order[start:stop].tolist()
        return every

    def total(self, index: int) -> int:
        """Number of samples of all ranks in round `index`."""
        start, stop = self._range(index)
        return stop - start


class BatchRounds(Rounds):
    """Rounds made of the batches that the user's own batch sampler drew.

    Each rank takes one batch of a round (`whole`), or a share of each batch. Batches left over at the end
    are pooled and divided evenly.
    """

    def __init__(self, batches: Sequence[list[int]], rank: int, size: int, *, whole: bool) -> None:
        self._rank = rank
        self._rounds: list[list[list[int]]] = []  # round → rank → indices
        step = size if whole else 1
        for start in range(0, len(batches), step):
            group = list(batches[start : start + step])
            if not whole or len(group) < size:
                pool = [i for batch in group for i in batch]
                busy = busy_ranks(len(pool), size)
                ranges = [share(len(pool), r, busy) for r in range(size)]
                group = [pool[low:high] for low, high in ranges]
            self._rounds.append(group)
        if not any(part for group in self._rounds for part in group):
            raise ConfigError("the batch sampler gave no batch for this epoch")

    def __len__(self) -> int:
        return len(self._rounds)

    def own(self, index: int) -> list[int]:
        """This rank's sample indices in round `index`."""
        return self._rounds[index][self._rank]

    def everyone(self, index: int) -> list[int]:
        """All sample indices of round `index`."""
        return [i for part in self._rounds[index] for i in part]

    def total(self, index: int) -> int:
        """Number of samples of all ranks in round `index`."""
        return sum(len(part) for part in self._rounds[index])
