"""The bases of methods whose workers train alone for some minibatches and then exchange something."""

from __future__ import annotations

import abc
from typing import Any, ClassVar

import torch

from paceline import codecs
from paceline.codecs.reducers.flat_sums import FlatSums
from paceline.errors import Mismatch
from paceline.spec import Spec, whole_number
from paceline.strategies.base.strategy import TrainingStrategy


class PeriodicStrategy(TrainingStrategy):
    """Workers train alone; every `period` minibatches each of them calls `exchange`.

    All ranks count the same minibatches: also one whose optimizer step was skipped, and one of a rank that
    ran out of data and repeats a batch to stay in step. What a repeated batch changes in the parameters is
    undone.

    Args:
        period: Minibatches between two exchanges, at least 1.
    """

    replicas_differ = True

    def __init__(self, *, period: int) -> None:
        self.period = whole_number(f"{self.name}: period", period, least=1)
        self._done = 0
        """Minibatches since the last exchange."""
        self._real = 0
        """Those of them that trained on data of this rank's own."""
        self._kept: list[torch.Tensor] | None = None
        """The parameters as they were before a repeated batch."""

    @abc.abstractmethod
    def exchange(self) -> None:
        """Exchange with the other ranks: `period` minibatches are done."""

    def minibatch_done(self) -> None:
        """Called after every minibatch, before an exchange that is due."""

    def before_update(self) -> None:
        if not self.replica.has_samples and self._kept is None:
            self._kept = [flat.clone() for flat in self.replica.parameters]

    def after_update(self) -> None:
        if self._kept is not None:
            self.replica.adopt()
            torch._foreach_copy_(list(self.replica.parameters), self._kept)
            self._kept = None
        self._done += 1
        self._real += int(self.replica.has_samples)
        self.minibatch_done()
        if self._done >= self.period:
            self.exchange()
            self.start_period()

    def update_skipped(self) -> None:
        self.after_update()

    def start_period(self) -> None:
        """Count from zero again."""
        self._done = self._real = 0


_FEWEST_ROUNDS = 15
_WANTED_ROUNDS = 30
_MOST_MINIBATCHES_PER_SAMPLE = 10
_WANTED_MINIBATCHES_PER_SAMPLE = 4


def wanted_period(num_steps: int, batch_size: int) -> int:
    """The longest period with enough rounds to learn from, in which workers do not drift apart.

    They drift by the noise of their gradients, which grows with the minibatches, and as batches get smaller.

    Args:
        num_steps: Minibatches of the whole run.
        batch_size: Samples in a minibatch of one worker; 0 if that is not known.
    """
    longest = num_steps // _WANTED_ROUNDS
    if batch_size:
        longest = min(longest, _WANTED_MINIBATCHES_PER_SAMPLE * batch_size)
    return max(1, longest)


def check_period(period: int, num_steps: int, num_workers: int, batch_size: int) -> str:
    """Return a warning if a run averages too rarely with `period`, else ""."""
    rounds = num_steps // period
    if num_workers == 1 or period == 1:
        return ""
    advice = f"use period={wanted_period(num_steps, batch_size)}"
    if rounds < _FEWEST_ROUNDS:
        return (
            f"{num_steps} minibatches at period {period} are {rounds} averages, too few to learn from: "
            f"{advice}, or train for longer"
        )
    if batch_size and period > _MOST_MINIBATCHES_PER_SAMPLE * batch_size:
        samples = "1 sample" if batch_size == 1 else f"{batch_size} samples"
        return f"workers drift apart in {period} minibatches of {samples} each: {advice}, or larger batches"
    return ""


class AveragingStrategy(PeriodicStrategy):
    """Periods are rounds that end with a mean of the workers' models, weighted by their minibatches.

    Args:
        period: Minibatches of a round, at least 1; None: `default_period`, or less if the run is short or a
            worker's minibatches are small.
        codec: A codec for what the workers have learned in a round, such as `int8`; None sends the models
            uncompressed.
    """

    takes_turns = True
    finishes_unevenly = True
    default_period: ClassVar[int] = 16

    def __init__(self, *, period: int | None, codec: str | Spec | None) -> None:
        super().__init__(period=self.default_period if period is None else period)
        self._is_period_given = period is not None
        self._sums = None if codec is None else FlatSums(codecs.make_reducer(codec))

    def fit(self, num_steps: int, num_workers: int, batch_size: int = 0) -> str:
        if not self._is_period_given:
            self.period = min(self.default_period, wanted_period(num_steps, batch_size))
        return check_period(self.period, num_steps, num_workers, batch_size)

    @abc.abstractmethod
    def close_round(self, *, finishing: bool) -> bool:
        """End a round on all ranks; `finishing` says that this one is in `synchronize`.

        Returns whether all ranks are finishing.
        """

    def exchange(self) -> None:
        self.await_turn()
        try:
            self.close_round(finishing=False)
        except Mismatch as error:
            raise Mismatch(
                f"{error}. All ranks exchange every {self.period} minibatches here: one may have left out an"
                " optimizer.step() that others took; let all leave out the same"
            ) from error

    def join(self) -> None:
        self.close_round(finishing=True)
        self.start_period()

    def synchronize(self) -> None:
        """Close the last round. Ranks that still train finish their rounds with this rank's weight 0."""
        all_finish = False
        while not all_finish:
            self.await_turn(is_finishing=True)
            all_finish = self.close_round(finishing=True)
            self.start_period()

    def stats(self) -> dict[str, Any]:
        """`codec`: bytes by cause, encode seconds and extra memory on this rank."""
        return {} if self._sums is None else {"codec": self._sums.stats()}
