"""The batch that a loop has in hand: it may fetch some ahead, leave some out, or train some again.

A batch is recognised by the memory of its tensors when a model gets them. Where a loop makes other tensors of
them first, and has fetched more than one batch, it cannot be known which one it trains: that matters only if
they count differently, and is then refused.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from paceline.errors import ConfigError
from paceline.train.data.forwards import ForwardPass
from paceline.train.data.handed_out import HandedBatch, LoaderPass, Memory, Source, Trainee, memory_of
from paceline.train.data.known import KnownBatches, most_in


def recognised(batches: Iterable[HandedBatch], memory: Memory) -> HandedBatch | None:
    """The batch whose tensors are in this memory, more than any other's; None if there is no such."""
    found = most_in(batches, memory)
    return found[0] if len(found) == 1 else None


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
        self.newest = -1
        """The number of the batch that was handed out last; -1 before the first."""
        self._current: HandedBatch | None = None
        self._thread: int | None = None
        self._is_known = True
        """Whether a model got the tensors of the current batch, or nothing else can be meant."""
        self._known = KnownBatches()
        self._trained_up_to: dict[Trainee, int] = {}
        """By model, the number of the newest batch when its last backward pass began."""
        self._got: HandedBatch | None = None
        """What a model got last, with gradients or without."""
        self._gets_own: dict[LoaderPass, bool] = {}
        """By pass, whether models get the tensors of batches themselves."""
        self._sees_models = True
        """Whether models are called as a whole, so that it is known what they get."""

    def hand_out(self, batch: HandedBatch) -> None:
        """A loader hands it out."""
        if batch.counted == 0 and any(one.weighs_samples for one in batch.following):
            raise ConfigError(
                f"rank {self._rank}: a batch came out of collate_fn without samples, where this rank has"
                f" {batch.own} of {batch.every}: the other ranks train theirs, and wait for this one. Let"
                " collate_fn keep at least one sample, and say job.weight(samples that count in this batch)"
                " before each backward pass, 0 where none does; or leave the samples out of the data set,"
                " before prepare()"
            )
        with self._lock:
            self._known.add(batch)
            before = [w for w in self._waiting if w.one is batch.one]
            self._waiting = [w for w in self._waiting if w.one is not batch.one and not w.is_gone]
            if before and not self._sees_models:
                before = []
            elsewhere = self._thread is not None and threading.get_ident() != self._thread
            self._waiting += [*before, batch]
            self.newest = batch.number
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

    def given(self, follower: Trainee, inputs: Any) -> ForwardPass | None:
        """A model gets these inputs; returns which batches they are, if gradients are wanted."""
        look = functools.cache(lambda: memory_of(inputs))  # most loops need not look
        with self._lock:
            if self._waiting:
                self._thread = threading.get_ident()
                self._take_from_waiting(follower, look)
            if (one := self._unmistakable(follower)) is not None:
                return ForwardPass([one], is_certain=True) if torch.is_grad_enabled() else None
            found = self._known.among(look())  # also of a loader that was prepared apart
            if len(found) == 1 and (torch.is_grad_enabled() or follower.module.training):
                found[0].loader.own_samples = found[0].own
                follower.take_up(found[0])
            if not torch.is_grad_enabled():
                return None
            return ForwardPass(found or self._in_play(follower), is_certain=bool(found))

    def _unmistakable(self, follower: Trainee) -> HandedBatch | None:
        """The batch in hand, if any other that a model may get counts like it."""
        one = self._current
        if one is None or self._waiting or not self._known.are_alike or not one.one.is_open:
            return None
        return one if any(other is follower for other in one.following) else None

    def _take_from_waiting(self, follower: Trainee, look: Callable[[], Memory]) -> None:
        mine = self._waiting_for(follower)
        if all(w.is_begun for w in mine):  # several: of passes that go on side by side
            for batch in self._meant(mine, follower, look):
                if batch.one not in self._gets_own:
                    self._gets_own[batch.one] = recognised([batch], look()) is batch
                self._found(batch)
            return
        known = [self._current] if self._current is not None and self._current not in mine else []
        found = recognised([*mine, *known], look())
        if found in known and found is not None:  # once more
            self._is_known = True
        elif found is not None:
            self._found(found)
            # This loop gives its models what it got: what is gone was left out.
            self._waiting = [w for w in self._waiting if not (w.one is found.one and w.is_gone)]

    def _meant(
        self, mine: list[HandedBatch], follower: Trainee, look: Callable[[], Memory]
    ) -> list[HandedBatch]:
        """Those of the waiting batches that may be what a model gets: in a validation, none to be trained."""
        evaluates = not torch.is_grad_enabled() and not follower.module.training
        if len(self._passes) < 2 and not evaluates:
            return mine
        if recognised(mine, look()) is None and self._known.among(look()):
            return []  # it is known, and another one
        return [b for b in mine if not (evaluates and b.following) or b.count_in(look())]

    def _in_play(self, follower: Trainee) -> list[HandedBatch]:
        """Batches that a model may have got which are not recognised: the newest of each pass.

        Those of passes that go on; if some were handed out since its last backward pass, those.
        """
        ahead = [w for w in self._waiting_for(follower) if not w.is_begun]
        if ahead:
            return ahead
        since = self._trained_up_to.get(follower, -1)
        current = [one.current for one in self._passes if one.is_open and one.current is not None]
        mine = [b for b in current if any(one is follower for one in b.following)]
        return [b for b in mine if b.number > since] or mine

    def backward(self, follower: Trainee, forwards: Sequence[ForwardPass]) -> None:
        """Its backward pass begins: from here on the weight of the batch counts.

        Args:
            follower: The model.
            forwards: The forward passes that it goes through; empty if that is not known.

        Raises:
            ConfigError: Several batches are meant, or may be, which count differently.
        """
        with self._lock:
            if self._current is not None:
                self._current.loader.retrieve(self._current.one)
            is_certain = bool(forwards) and all(one.is_certain for one in forwards)
            if self._waiting and not is_certain:
                self._take_unrecognised(self._waiting_for(follower), was_called=bool(forwards))
            batches = [b for one in forwards for b in one.batches] if forwards else self._in_play(follower)
            if batches:
                self._check_weights(follower, batches, is_certain=is_certain)
                batches[-1].loader.retrieve(batches[-1].one)
                follower.take_up(batches[-1], trains=True)
            self._trained_up_to[follower] = self.newest

    def _take_unrecognised(self, mine: list[HandedBatch], *, was_called: bool) -> None:
        if mine and all(w.is_begun for w in mine):
            self._sees_models = self._sees_models and was_called  # else: in parts, or not at all
            for batch in mine:
                self._found(batch)
        elif mine and not self._is_known:
            self._check_alike(mine, "trained", lambda a, b: a.counts_like(b))
            self._take(mine[-1])
            mine[-1].loader.retrieve(mine[-1].one)
            self._waiting = [w for w in self._waiting if w not in mine[:-1]]

    def _check_weights(self, follower: Trainee, batches: Sequence[HandedBatch], *, is_certain: bool) -> None:
        """ConfigError if the batches of one backward pass count differently, and the loop did not say how."""
        first = batches[0]
        if follower.is_told:
            return
        if follower.weighs_samples and (other := next((b for b in batches if b.counted is not None), None)):
            raise ConfigError(
                f"rank {self._rank}: this backward pass goes through a batch of {other.counted} samples, and"
                f" {other.own} of {other.every} were chosen for this rank: collate_fn left some out or made"
                " more of them, and how many the other ranks have is not known here. Say on every rank what"
                " each pass stands for: job.weight(samples of this rank in this loss) before it, e.g."
                " job.weight(len(targets)); or leave samples out of the data set, before prepare()"
            )
        if all(_alike(follower, first, other) for other in batches[1:]):
            return
        shares = ", ".join(f"{b.own} of {b.every}" for b in {b.number: b for b in batches}.values())
        goes_through = (
            "goes through" if is_certain else "goes through one of these, of which the model got copies:"
        )
        raise ConfigError(
            f"rank {self._rank}: this backward pass {goes_through} batches of which this rank has {shares}"
            " samples: they count differently, and one pass has one weight. Call backward for each batch by"
            " itself, with the tensors of the batch as the model's inputs; or say what the pass stands for:"
            " job.weight(samples of this rank in this loss) before it, e.g. job.weight(loader.own_samples)"
        )

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
            known = self._known.among(memory_of(values))
            found = known[0] if len(known) == 1 else self._most_likely()
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


def _alike(follower: Trainee, one: HandedBatch, other: HandedBatch) -> bool:
    """Whether gradients of the two count alike for a model."""
    if follower.weighs_samples:
        return one.weighs_like(other)
    return (one.own > 0) == (other.own > 0)
