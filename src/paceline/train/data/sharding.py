"""Which samples a rank trains on: pure arithmetic, the same on every rank.

An epoch is a list of rounds, one per minibatch. A round's samples are divided over the ranks as evenly as
possible, the first ranks taking one more; every rank has at least one sample in every round, so all ranks
make the same number of steps. No sample is padded or repeated: a last round with fewer samples than ranks
joins the round before it.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence

import torch

from paceline.errors import ConfigError


def share(count: int, rank: int, size: int) -> tuple[int, int]:
    """Half-open range of `count` things that belongs to `rank` of `size`."""
    base, extra = divmod(count, size)
    start = rank * base + min(rank, extra)
    return start, start + base + (rank < extra)


class Rounds(abc.ABC):
    """The minibatches of one epoch, seen from one rank."""

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def local(self, index: int) -> list[int]:
        """Sample indices of this rank in round `index`."""

    @abc.abstractmethod
    def total(self, index: int) -> int:
        """Number of samples of all ranks in round `index`."""


class OrderedRounds(Rounds):
    """Rounds of `round_size` consecutive samples of an order."""

    def __init__(
        self, order: torch.Tensor, round_size: int, rank: int, size: int, *, drop_last: bool
    ) -> None:
        count = order.numel()
        if count < size:
            raise ConfigError(
                f"{count} samples cannot be divided over {size} workers without repeating any; use at most"
                f" {max(count, 1)} workers"
            )
        full, rest = divmod(count, round_size)
        if drop_last and rest:
            count -= rest
        elif rest >= size or (rest and not full):
            full += 1  # a short round of its own; a shorter rest joins the last full round
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

    def local(self, index: int) -> list[int]:
        """This rank's sample indices in round `index`."""
        start, stop = self._range(index)
        low, high = share(stop - start, self._rank, self._size)
        chosen: list[int] = self._order[start + low : start + high].tolist()
        return chosen

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
        self._rank, self._size = rank, size
        self._rounds: list[list[list[int]]] = []  # round → rank → indices
        step = size if whole else 1
        for start in range(0, len(batches), step):
            group = list(batches[start : start + step])
            if whole and len(group) == size:
                self._rounds.append(group)
            else:
                self._append_pool([i for batch in group for i in batch])
        if not self._rounds:
            raise ConfigError("the batch sampler gave no batch for this epoch")

    def _append_pool(self, pool: list[int]) -> None:
        if len(pool) < self._size:
            if not self._rounds:
                raise ConfigError(f"{len(pool)} samples cannot be divided over {self._size} workers")
            pool = [i for part in self._rounds.pop() for i in part] + pool
        ranges = [share(len(pool), r, self._size) for r in range(self._size)]
        self._rounds.append([pool[low:high] for low, high in ranges])

    def __len__(self) -> int:
        return len(self._rounds)

    def local(self, index: int) -> list[int]:
        """This rank's sample indices in round `index`."""
        return self._rounds[index][self._rank]

    def total(self, index: int) -> int:
        """Number of samples of all ranks in round `index`."""
        return sum(len(part) for part in self._rounds[index])
