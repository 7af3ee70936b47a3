"""The batch that a loop has in hand: it may fetch some ahead, or leave some out.

A batch is recognised by the memory of its tensors when a model gets them. Where a loop makes other tensors of
them first, and has fetched more than one batch, it cannot be known which one it trains: that matters only if
they count differently, and is then refused.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch

from paceline.errors import ConfigError
from paceline.train.data.handed_out import HandedBatch, LoaderPass, Source, Trainee, memory_of

_RECENT = 16


def recognised(batches: Iterable[HandedBatch], things: Any) -> HandedBatch | None:
    """The batch whose tensors are among nested tensors, more than any other's; None if there is no such."""
    memory = memory_of(things)
    counts = sorted(((b.count_in(memory), b.number, b) for b in batches), key=lambda one: one[:2])
    if not counts or not counts[-1][0] or (len(counts) > 1 and counts[-2][0] == counts[-1][0]):
        return None
    return counts[-1][2]


class BatchesInHand:
    """Batches that were handed out and that no model has got yet, over all loaders of a job.

    A batch is in hand at once if none of its pass waits; else when a model gets its tensors. Followers whose
    models are never called themselves, but in parts, take every batch at once.

    Args:
        rank: This rank, for messages.
        follows: Whether a model follows a loader.
    """

    def __init__(self, rank: int, follows: Callable[[Trainee, Source], bool]) -> None:
        self._rank, self._follows = rank, follows
        self._lock = threading.RLock()  # a thread of the loop's own may fetch batches
        self._waiting: list[HandedBatch] = []
        self._passes: list[LoaderPass] = []  # the one that handed out a batch last is last
        self._recent: deque[HandedBatch] = deque(maxlen=_RECENT)
        self._current: HandedBatch | None = None
        self._thread: int | None = None
        self._is_known = True
        """Whether a model got the tensors of the current batch, or nothing else can be meant."""
        self._given: HandedBatch | None = None
        """What a model got last, until its backward pass."""
        self._got: HandedBatch | None = None
        """What a model got last, with gradients or without."""
        self._gets_own: dict[LoaderPass, bool] = {}
        """By pass, whether models get the tensors of batches themselves."""
        self._sees_models = True
        """Whether models are called as a whole, so that it is known what they get."""

    def hand_out(self, batch: HandedBatch) -> None:
        """A loader hands it out."""
        with self._lock:
            before = [w for w in self._waiting if w.one is batch.one]
            self._waiting = [w for w in self._waiting if w.one is not batch.one and not w.is_gone]
            if before and not self._sees_models:
                before = []
            elsewhere = self._thread is not None and threading.get_ident() != self._thread
            self._waiting += [*before, batch]
            self._recent.append(batch)
            if batch.one not in self._passes:
                self._gets_own = {one: own for one, own in self._gets_own.items() if one.is_open}
            self._passes = [one for one in self._passes if one is not batch.one] + [batch.one]
            if before or elsewhere:
                self._is_known = False
            else:
                self._take(batch)

    def is_waited_for(self, one: LoaderPass) -> bool:
        """Whether batches of a pass have been handed out that no model has got."""
        return any(w.one is one for w in self._waiting)

    def skip(self) -> None:
        """The batch in hand is not trained: the first that waits, of the pass that handed out one last."""
        with self._lock:
            waiting = next((one for one in reversed(self._passes) if self.is_waited_for(one)), None)
            if waiting is not None:
                self._waiting.remove(next(w for w in self._waiting if w.one is waiting))

    def given(self, follower: Trainee, inputs: Any) -> None:
        """A model gets these inputs."""
        if not self._waiting:
            return
        with self._lock:
            self._thread = threading.get_ident()
            mine = self._waiting_for(follower)
            if all(w.is_begun for w in mine):  # several: of passes that go on side by side
                for batch in mine:
                    if batch.one not in self._gets_own:
                        self._gets_own[batch.one] = recognised([batch], inputs) is batch
                    self._found(batch)
            else:
                known = [self._current] if self._current is not None and self._current not in mine else []
                found = recognised([*mine, *known], inputs)
                if found in known and found is not None:  # once more
                    self._is_known = True
                elif found is not None:
                    self._found(found)
                    # This loop gives its models what it got: what is gone was left out.
                    self._waiting = [w for w in self._waiting if not (w.one is found.one and w.is_gone)]

    def backward(self, follower: Trainee) -> None:
        """Its backward pass begins: from here on the weight of the batch counts.

        Raises:
            ConfigError: Several batches may be meant, which count differently.
        """
        if self._current is not None:
            self._current.loader.retrieve(self._current.one)
        if not self._waiting:
            self._given = None
            return
        with self._lock:
            given, self._given = self._given, None
            mine = self._waiting_for(follower)
            if given is not None:
                newer = [w for w in mine if w.is_begun and w.number > given.number]
                if newer:  # it was fetched before this backward pass
                    self._check_alike([given, *newer], "trained", lambda a, b: a.counts_like(b))
            elif mine and all(w.is_begun for w in mine):
                self._sees_models = False  # it was called in parts, or not at all
                for batch in mine:
                    self._found(batch)
            elif mine and not self._is_known:
                self._check_alike(mine, "trained", lambda a, b: a.counts_like(b))
                self._take(mine[-1])
                mine[-1].loader.retrieve(mine[-1].one)
                self._waiting = [w for w in self._waiting if w not in mine[:-1]]

    def block(self, follower: Trainee, is_last: bool) -> bool:
        """A block of `job.accumulate` begins: whether its batch is the pass' last, if not as was said.

        Raises:
            ConfigError: It is not known which batch it is, and one of them is the last.
        """
        with self._lock:
            mine = self._waiting_for(follower)
            if len(mine) > 1:  # what a model is to get itself, and is gone, was left out
                mine = [w for w in mine if not (w.is_gone and self._gets_own.get(w.one))] or mine
            if len(mine) < 2:
                return mine[0].is_last if mine and not self._is_known else is_last
            self._check_alike(mine, "in job.accumulate", lambda a, b: a.is_last == b.is_last)
            return mine[-1].is_last

    def gathered(self, values: Any) -> HandedBatch | None:
        """The batch whose values a loop gathers; None if no batch is in hand.

        Raises:
            ConfigError: Several may be meant, of which only some have samples here.
        """
        with self._lock:
            found = recognised(self._recent, values)
            if found is None:
                found = self._most_likely()
            if found is not None:
                found.is_gathered = True
                if found in self._waiting:
                    self._found(found)
            return found

    def _waiting_for(self, follower: Trainee) -> list[HandedBatch]:
        return [w for w in self._waiting if self._follows(follower, w.loader)]

    def _most_likely(self) -> HandedBatch | None:
        self._passes = [one for one in self._passes if one.is_open or self.is_waited_for(one)]
        if not self._passes:
            return None
        one = self._passes[-1]
        may_be = [w for w in self._waiting if w.one is one and not w.is_gathered]
        got = self._got
        if got is not None and got.one is one and not got.is_gathered and got not in may_be:
            may_be.append(got)
        self._check_alike(may_be, "gathered", lambda a, b: (a.own > 0) == (b.own > 0))
        return may_be[-1] if may_be else one.current

    def _found(self, batch: HandedBatch) -> None:
        self._waiting.remove(batch)
        self._got = batch
        if torch.is_grad_enabled():
            self._given = batch
        self._take(batch)

    def _take(self, batch: HandedBatch) -> None:
        self._current, self._is_known = batch, True
        batch.one.current = batch
        if not batch.is_begun:
            batch.begin()

    def _check_alike(
        self, batches: list[HandedBatch], what: str, alike: Callable[[HandedBatch, HandedBatch], bool]
    ) -> None:
        if all(alike(batches[0], other) for other in batches[1:]):
            return
        raise ConfigError(
            f"rank {self._rank}: {len(batches)} batches were fetched of which no model has got the tensors,"
            f" and they count differently: it cannot be known which one is {what} now. Use each batch before"
            " the next is fetched, or give the models the tensors of the batch themselves; where the loop"
            " leaves a batch out, say job.skip()"
        )
