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
    """The micro-batches of one update: their samples, and how many backward passes there have been."""

    def __init__(self) -> None:
        self.backwards = 0
        """Backward passes since the last that was reduced."""
        self.is_last_batch = False
        """Whether the loader said that this is the epoch's last batch."""
        self._samples: list[tuple[int, int]] = []  # (own, all ranks') of each micro-batch

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

    def clear(self) -> None:
        """The data is used up."""
        self._samples, self.is_last_batch = [], False
