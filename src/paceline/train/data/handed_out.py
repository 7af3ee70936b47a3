"""Passes over loaders, and their batches, recognised by the memory of their tensors when models get them."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

Memory = dict[StorageWeakRef, tuple[int, int]]
"""Of each storage, the first byte that is used and the one after the last."""
_numbers = itertools.count()


def tensors_in(things: Any) -> list[torch.Tensor]:
    """All tensors in nested tuples, lists, dicts and what else torch knows how to open; a quick walk."""
    if isinstance(things, torch.Tensor):
        return [things]
    kind = type(things)
    if kind is tuple or kind is list:
        return [tensor for one in things for tensor in tensors_in(one)]
    if kind is dict:
        return [tensor for one in things.values() for tensor in tensors_in(one)]
    if kind in (int, float, bool, str, type(None)):
        return []
    return [leaf for leaf in pytree.tree_leaves(things) if isinstance(leaf, torch.Tensor)]


def memory_of(things: Any) -> Memory:
    """Where all tensors in nested tuples, lists and dicts lie; views lie in the storage of their base."""
    found: Memory = {}
    for leaf in tensors_in(things):
        if leaf.layout is torch.strided and leaf.numel():
            # Wrappers around tensors have no memory of their own.
            with contextlib.suppress(NotImplementedError, RuntimeError):
                storage = StorageWeakRef(leaf.untyped_storage())  # type: ignore[no-untyped-call]
                last = sum((n - 1) * step for n, step in zip(leaf.shape, leaf.stride(), strict=True))
                begin = int(leaf.storage_offset()) * leaf.element_size()
                end = begin + int(last + 1) * leaf.element_size()
                first, after = found.get(storage, (begin, end))
                found[storage] = (min(first, begin), max(after, end))
    return found


def apart(batch: Any) -> Any:
    """The same batch in memory of its own: a rank that repeats a batch hands out another one."""
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, batch)


class Trainee(Protocol):
    """A prepared model."""

    @property
    def module(self) -> nn.Module: ...
    @property
    def weighs_samples(self) -> bool: ...
    @property
    def is_told(self) -> bool: ...
    def batch_begins(self, batch: HandedBatch) -> None: ...
    def take_up(self, batch: HandedBatch, *, trains: bool = False) -> None: ...


class Source(Protocol):
    """A prepared loader."""

    own_samples: int
    is_gathered: bool
    leaves_out_ranks: bool

    def retrieve(self, one: LoaderPass) -> None: ...


class LoaderPass:
    """One iteration over a loader: its number chooses the order, and it counts once a batch was trained."""

    def __init__(self, number: int, step: int, progress: object) -> None:
        self.number = number
        self.start = step
        self.step = step
        """Batches handed out, those before a resumption included."""
        self.is_counted = False
        self.handed = (0, 0)
        """Batches, and samples of all ranks, handed out to train on since the pass was begun or resumed."""
        self.is_open = True
        self.current: HandedBatch | None = None
        """The batch in hand."""
        self._progress = progress

    def settle(self, progress: object) -> None:
        """Learn how far training is now: if it has moved since the first batch, this pass counts."""
        if not self.handed[0]:  # what ends now was begun on batches of an earlier pass
            self._progress = progress
        self.is_counted = self.is_counted or progress != self._progress


class HandedBatch:
    """One batch that a loader handed out.

    Args:
        batch: What the loop gets; only the memory of its tensors is kept, weakly.
        own: Samples of this rank; 0 if it repeats earlier ones.
        every: Samples of all ranks.
        is_last: Whether it is the pass' last batch.
        loader: Where it comes from.
        one: The pass.
    """

    def __init__(
        self, batch: Any, own: int, every: int, is_last: bool, loader: Source, one: LoaderPass
    ) -> None:
        self.own, self.every, self.is_last = own, every, is_last
        self.loader, self.one = loader, one
        self.following: Sequence[Trainee] = ()
        """Who trains on it; empty in evaluations."""
        self.counted: int | None = None
        """How many samples it has, where collate_fn made another number of them than `own`."""
        self.is_begun = False
        """Whether those have learnt its weight."""
        self.is_gathered = False
        self.number = next(_numbers)
        """In the order of handing out, over all loaders of the process."""
        self.memory = memory_of(batch)
        """Where its tensors lay, weakly."""

    @property
    def is_gone(self) -> bool:
        """Whether none of its tensors exists any more."""
        return all(storage.expired() for storage in self.memory)  # type: ignore[no-untyped-call]

    def count_in(self, memory: Memory) -> int:
        """How many of its tensors, or views of them, are there. Batches may be parts of one storage."""
        found = 0
        for storage in self.memory.keys() & memory.keys():
            (begin, end), (first, after) = self.memory[storage], memory[storage]
            found += begin < after and first < end
        return found

    def weighs_like(self, other: HandedBatch) -> bool:
        """Whether gradients of the two count alike."""
        return self.own * other.every == other.own * self.every and (self.own > 0) == (other.own > 0)

    def counts_like(self, other: HandedBatch) -> bool:
        """Whether it makes no difference which of the two is trained."""
        return self.weighs_like(other) and self.is_last == other.is_last

    def begin(self) -> None:
        """Tell those who train on it what it counts."""
        self.is_begun = True
        self.loader.own_samples = self.own
        for one in self.following:
            one.batch_begins(self)
