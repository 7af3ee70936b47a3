"""Where one minibatch stands: an explicit phase with a table of transitions, and its accumulation window."""

from __future__ import annotations

import enum


class Phase(enum.Enum):
    """What is known about the gradients of the minibatch in progress."""

    IDLE = "no gradients"
    BACKWARD = "a backward pass is running"
    UNSENT = "accumulated on this rank, not reduced yet"
    COMPLETE = "reduced over all ranks, waiting for the optimizers"


class MinibatchEvent(enum.Enum):
    """What moves a minibatch from one phase to the next."""

    BACKWARD_BEGINS = "the first gradient of a backward pass arrived"
    GRADIENTS_KEPT = "a backward pass ended that only accumulates"
    GRADIENTS_REDUCED = "all gradients were reduced: at the end of backward, or late, before a step"
    WINDOW_DROPPED = "a loop was left in the middle of a window, whose gradients were cleared"
    MINIBATCH_ENDS = "all optimizers stepped, or their steps were skipped"


TRANSITIONS: dict[tuple[Phase, MinibatchEvent], Phase] = {
    (Phase.IDLE, MinibatchEvent.BACKWARD_BEGINS): Phase.BACKWARD,
    (Phase.UNSENT, MinibatchEvent.BACKWARD_BEGINS): Phase.BACKWARD,  # one more micro-batch of the window
    (Phase.COMPLETE, MinibatchEvent.BACKWARD_BEGINS): Phase.BACKWARD,  # a second loss before the step
    (Phase.BACKWARD, MinibatchEvent.GRADIENTS_KEPT): Phase.UNSENT,
    (Phase.BACKWARD, MinibatchEvent.GRADIENTS_REDUCED): Phase.COMPLETE,
    (
        Phase.UNSENT,
        MinibatchEvent.GRADIENTS_REDUCED,
    ): Phase.COMPLETE,  # the step came early
    (Phase.UNSENT, MinibatchEvent.WINDOW_DROPPED): Phase.IDLE,
    (Phase.COMPLETE, MinibatchEvent.MINIBATCH_ENDS): Phase.IDLE,
    (
        Phase.UNSENT,
        MinibatchEvent.MINIBATCH_ENDS,
    ): Phase.UNSENT,  # the one before it ends
    (Phase.IDLE, MinibatchEvent.MINIBATCH_ENDS): Phase.IDLE,
    (
        Phase.BACKWARD,
        MinibatchEvent.MINIBATCH_ENDS,
    ): Phase.BACKWARD,  # a step inside backward
}


class MinibatchState:
    """The phase of the minibatch in progress.

    A backward pass that raised never reaches its end: `backward_was_abandoned` goes back to the phase in
    which it began.
    """

    def __init__(self) -> None:
        self.phase = Phase.IDLE
        self._before_backward = Phase.IDLE
        self.awaits_step = False
        """Whether reduced gradients wait for the optimizers, also while a further backward pass runs."""

    def advance(self, event: MinibatchEvent) -> None:
        """Move on; an AssertionError for what cannot happen in this phase."""
        after = TRANSITIONS.get((self.phase, event))
        assert after is not None, f"{event.name} in phase {self.phase.name}"
        if event is MinibatchEvent.BACKWARD_BEGINS:
            self._before_backward = self.phase
        self.phase = after

    def backward_was_abandoned(self) -> None:
        """The loop went on to the next batch: whatever backward was running is over."""
        if self.phase is Phase.BACKWARD:
            self.phase = self._before_backward


class AccumulationWindow:
    """The micro-batches of one update: their samples, and how many backward passes there have been.

    Args:
        steps: How many backward passes, or blocks of `job.accumulate`, a full window has.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.backwards = 0
        """Backward passes since the last that was reduced."""
        self.is_last_batch = False
        """Whether the loader said that this is the epoch's last batch."""
        self.closes: bool | None = None
        """Whether the block of `job.accumulate` that runs, or ran last, ends a window; None: no block."""
        self.is_in_block = False
        self._blocks = 0  # since the last that ended a window
        self._samples: list[tuple[int, int]] = []  # (own, all ranks') of each micro-batch

    def block_begins(self, *, knows_last: bool) -> None:
        """A block of `job.accumulate` is one micro-batch, with any number of backward passes.

        Args:
            knows_last: Whether a loader says which batch is the last.
        """
        self._blocks += 1
        self.is_in_block, self.closes = True, self._is_full(self._blocks, knows_last=knows_last)

    def block_ends(self) -> None:
        """Its statements are done, or one has raised."""
        self.is_in_block = False
        if self.closes:
            self._blocks = 0

    def must_reduce(self, *, knows_last: bool) -> bool:
        """Whether the backward pass that was counted last reduces what is accumulated."""
        return bool(self.closes) if self.is_in_block else self._is_full(self.backwards, knows_last=knows_last)

    def _is_full(self, count: int, *, knows_last: bool) -> bool:
        return count >= self.steps or (self.is_last_batch and knows_last)

    def add(self, own_samples: int, all_samples: int, *, is_last: bool) -> None:
        """One more micro-batch; the first of a new window if nothing is accumulated."""
        if self.backwards == 0:
            self._samples = []
        self._samples.append((own_samples, all_samples))
        self.is_last_batch = is_last

    @property
    def own_samples(self) -> int:
        """Samples of this rank in the window."""
        return sum(own for own, _ in self._samples)

    @property
    def all_samples(self) -> int:
        """Samples of all ranks in the window."""
        return sum(total for _, total in self._samples)

    def drop(self) -> None:
        """What was accumulated is gone."""
        self.backwards = self._blocks = 0
        self._samples = []

    def clear(self) -> None:
        """The data is used up."""
        self._samples, self.is_last_batch = [], False
