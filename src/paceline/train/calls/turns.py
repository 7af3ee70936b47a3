"""Whose turn it is: which model the ranks exchange next, and meetings of all ranks beside the methods.

A rank that leaves out the step of one model, as a GradScaler does for gradients that are not finite, learns
of it at that model's next batch. The others exchange the model meanwhile, if their method lets each rank step
by itself; with a second model, this rank would come to the exchange of that one instead. So before an
exchange the ranks tell each other which model they are at, and those that have left out the step of the one
whose turn it is end its minibatch then. A job with one model tells nothing: there is only one to exchange.
With SyncBatchNorm, forward passes are meetings too, and told as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from paceline.comm.spread import of_all_ranks
from paceline.errors import Mismatch
from paceline.train.attachment import Attachment
from paceline.types import Communicator

_MEND = "let all ranks leave out the same steps, decided by job.all_reduce_metrics, for example"


@dataclass(frozen=True)
class _Wish:
    """What one rank is at."""

    rank: int
    model: int | None
    """The model that it is about to exchange; None: a meeting of all ranks."""
    is_finishing: bool
    minibatches: list[int]
    """Of each model."""
    may_be_finished: list[bool]
    """For each model: whether its gradients are complete and its steps have not come."""


class Turns:
    """Agrees with the other ranks on what is exchanged next.

    Args:
        comm: All ranks of the job.
        attachments: The job's models; filled later, in the same order on all ranks.
    """

    def __init__(self, comm: Communicator, attachments: Sequence[Attachment]) -> None:
        self._comm, self._attachments = comm, attachments
        self._exchanged: list[int] = []  # models, the one exchanged last at the end
        self._joins: int | None = None  # the model whose minibatch is ended because of the others

    def await_turn(self, model: int, is_finishing: bool) -> None:
        """Return when all ranks exchange this model next.

        Args:
            model: Its index.
            is_finishing: This rank trains no more, and others may have done other numbers of minibatches.

        Raises:
            Mismatch: They are at different models or minibatches, and none has left out a step.
            ConfigError: On a rank that steps its models in another order.
        """
        if model == self._joins:
            self._joins = None
        elif self._are_taken:
            self._agree(model, is_finishing=is_finishing)
        self._note(model)

    @contextmanager
    def meeting(self, *, rests: bool = True) -> Iterator[None]:
        """Inside, all ranks wait for each other: this one is level with them, and delays none.

        Args:
            rests: Tell servers that this rank rests; default True.

        Raises:
            Mismatch: With what mends it, where this rank has left out a step that the others took.
        """
        for one in self._attachments:
            one.finish_skipped(meets=True)
            if rests:
                one.strategy.rest()
        if self._are_taken:
            self._agree(None)
        try:
            yield
        except Mismatch as error:
            if any(one.strategy.takes_turns and one.awaits_step for one in self._attachments):
                raise Mismatch(
                    f"{error}. If rank {self._comm.rank} has left out an optimizer.step() that other ranks"
                    f" took: {_MEND}"
                ) from error
            raise

    def before_forward(self, module: nn.Module, _: object) -> None:
        """A model with SyncBatchNorm begins a forward pass, in which all ranks wait for each other."""
        if module.training and self._are_taken:
            self._agree(None)

    def _note(self, model: int) -> None:
        if model in self._exchanged:
            self._exchanged.remove(model)
        self._exchanged.append(model)

    @property
    def _are_taken(self) -> bool:
        has_several = len(self._attachments) > 1
        return self._comm.size > 1 and any(
            one.strategy.takes_turns and (has_several or one.weights.is_shared) for one in self._attachments
        )

    def _agree(self, model: int | None, *, is_finishing: bool = False) -> None:
        while True:
            wishes = self._tell(model, is_finishing=is_finishing)
            chosen = self._next(wishes)
            if chosen == model:
                return
            assert chosen is not None  # a meeting waits for all ranks
            if not self._join(chosen, is_finishing=is_finishing):
                raise self._mismatch(wishes)

    def _join(self, model: int, *, is_finishing: bool) -> bool:
        """Take part in the exchange of a model at which the others are; whether there was one."""
        one = self._attachments[model]
        if is_finishing and not one.may_be_finished:
            self._note(model)
            one.strategy.join()
            return True
        self._joins = model
        one.finish_for_others()
        is_done, self._joins = self._joins is None, None
        return is_done

    def _tell(self, model: int | None, *, is_finishing: bool) -> list[_Wish]:
        states = [2 * one.told_minibatches + int(one.may_be_finished) for one in self._attachments]
        wanted = 1 if model is None else 2 + model  # 0: a rank that was lost
        rows = of_all_ranks(torch.tensor([wanted, int(is_finishing), *states]), self._comm).tolist()
        return [
            _Wish(
                rank,
                None if row[0] == 1 else row[0] - 2,
                bool(row[1]),
                [state // 2 for state in row[2:]],
                [bool(state % 2) for state in row[2:]],
            )
            for rank, row in enumerate(rows)
            if row[0]
        ]

    def _next(self, wishes: list[_Wish]) -> int | None:
        """What all ranks do next: the same on all of them, as it follows from what all have told."""
        models = {wish.model for wish in wishes if wish.model is not None}
        if not models:
            return None
        for model in sorted(models, key=self._recency):
            at_it = [wish for wish in wishes if wish.model == model]
            counts = {wish.minibatches[model] for wish in at_it if not wish.is_finishing}
            others = [wish for wish in wishes if wish.model != model]
            if len(counts) == 1 and all(self._joins_in(wish, model, *counts) for wish in others):
                return model
            if not counts and not others:  # all are finishing
                return model
        raise self._mismatch(wishes)

    def _joins_in(self, wish: _Wish, model: int, count: int) -> bool:
        """Whether a rank that is at something else can take part in the exchange of a model."""
        has_left_out = wish.may_be_finished[model] and wish.minibatches[model] + 1 == count
        return has_left_out or (wish.is_finishing and self._attachments[model].strategy.finishes_unevenly)

    def _recency(self, model: int) -> tuple[int, int]:
        """The one exchanged longest ago is next in the loop's order; at first, the one prepared first."""
        return (self._exchanged.index(model) if model in self._exchanged else -1, model)

    def _mismatch(self, wishes: list[_Wish]) -> Mismatch:
        told = ", ".join(
            f"rank {wish.rank} at "
            + (
                "a call that all ranks make together"
                if wish.model is None
                else f"minibatch {wish.minibatches[wish.model]} of model {wish.model}"
                + (" (finishing)" if wish.is_finishing else "")
            )
            for wish in wishes
        )
        return Mismatch(
            f"rank {self._comm.rank}: the ranks are about to exchange different models (in the order in which"
            f" prepare got them): {told}. Give all ranks as many batches and the same order of models, and"
            f" {_MEND}"
        )
