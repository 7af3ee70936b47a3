"""What the gradient of each backward pass counts in the mean over all ranks.

A reduced gradient is Σ unit · (what a rank has accumulated); the units of all ranks add up to 1. A backward
pass that is reduced by itself needs no more: its unit is this rank's share of the samples. Where several
passes are summed up before they are reduced, each has a share of its own: the unit is 1/P, and the gradient
of each pass is multiplied by P · share before autograd adds it to `grad`. That costs nothing where all ranks
have equally many samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge

from paceline.errors import ConfigError
from paceline.train.data.handed_out import HandedBatch, tensors_in
from paceline.train.replica import FlatReplica
from paceline.types import Communicator

LOSS_REDUCTIONS = ("mean", "sum")


def check_reduction(name: str) -> None:
    """ConfigError for another name."""
    if name not in LOSS_REDUCTIONS:
        raise ConfigError(f"loss_reduction={name!r}: 'mean' or 'sum' expected")


class GradientWeights:
    """The weights of one model's backward passes on this rank.

    Args:
        replica: The model; its `weight` is the unit.
        comm: The ranks that train together.
        loss_reduction: Whether the loss is a "mean" over samples or tokens, or their "sum".
        reduces: Whether gradients are summed over the ranks; otherwise they stay this rank's own.
    """

    def __init__(
        self, replica: FlatReplica, comm: Communicator, *, loss_reduction: str, reduces: bool
    ) -> None:
        self._replica, self._comm, self._size, self._reduces = replica, comm, comm.size, reduces
        self._is_sum = loss_reduction == "sum"
        self.repeats = False
        """Whether this rank ran out of data, and its batch counts nothing."""
        self.is_shared = False
        """Whether samples of this rank are part of other ranks' losses too: through SyncBatchNorm."""
        self.is_cut = False
        """Whether the gradient ends at the model's outputs: only other ranks' losses have a gradient here."""
        self._told_at: int | None = None  # the newest batch when the loop said what its passes stand for
        self._told_of: HandedBatch | None = None  # the batch that a pass has trained since
        self._is_spent = False  # whether gradients have been complete since it said so
        self._nodes: list[Any] = []  # autograd keeps a hook while its node is referred to
        self._handles: list[Any] = []
        self.clear()

    @property
    def is_sum(self) -> bool:
        """Whether the loss is a sum, which needs no counts."""
        return self._is_sum

    @property
    def factor(self) -> float:
        """By what the gradient of the coming pass is multiplied before it is added up."""
        return self._factor

    @property
    def share(self) -> float:
        """By what this rank's loss is multiplied so that all ranks' add up to that of one process."""
        return self._scaled_share() / self._size

    @property
    def weighs_samples(self) -> bool:
        """Whether gradients are multiplied by this rank's share of the samples."""
        return self._reduces and not self._is_sum

    @property
    def is_told(self) -> bool:
        """Whether the loop itself said what the coming passes stand for."""
        return self._told_at is not None

    def tell(self, own: float, every: float, *, newest: int, is_alone: bool) -> None:
        """The loop says what the coming backward passes stand for; holds until they train another batch.

        Args:
            own: Samples or tokens of this rank.
            every: Those of all ranks.
            newest: The number of the batch that was handed out last.
            is_alone: As for `set`.
        """
        self._told_at, self._told_of, self._is_spent = newest, None, False
        self.set(own, every, is_alone=is_alone)

    def trains(self, batch: HandedBatch) -> None:
        """A backward pass trains this batch."""
        self._told_of = self._told_of or batch

    def take(self, batch: HandedBatch, *, is_alone: bool) -> None:
        """The coming backward passes stand for this batch, unless the loop has said something about it."""
        self.repeats = batch.own == 0
        is_meant = self._told_at is not None and batch.number <= self._told_at
        if not (is_meant and self._told_of in (None, batch)):
            self._told_at = None
            self.set(batch.own, batch.every, is_alone=is_alone)

    def spend(self) -> None:
        """Gradients are complete: what the loop said before was meant for them."""
        self._is_spent = True

    def clear_spent(self) -> None:
        """All ranks count alike from now on, unless the loop has said already what comes next."""
        if self._is_spent:
            self.clear()

    def clear(self) -> None:
        """All ranks count alike from now on."""
        self.repeats, self._told_at = False, None
        self.set(1.0, float(self._size), is_alone=True)

    def set(self, own: float, every: float, *, is_alone: bool) -> None:
        """Say how many samples or tokens the coming backward passes stand for.

        Args:
            own: Those of this rank.
            every: Those of all ranks.
            is_alone: Whether the next pass is reduced by itself, without others before it.
        """
        self._own, self._all = own, every
        self.weigh(is_alone=is_alone)

    def weigh(self, *, is_alone: bool) -> None:
        """Choose unit and factor for the counts that were set; `is_alone` as for `set`."""
        is_alone = is_alone and not self.is_shared and not self._is_sum and self._all > 0
        if is_alone:
            self._replica.weight, self._factor = self._own / self._all, 1.0
        else:
            self._replica.weight, self._factor = 1.0 / self._size, self._scaled_share()
        if not self._reduces:
            self._factor = 1.0 if self._own > 0 else 0.0
        self.is_cut = self.is_shared and self._factor == 0.0 and not self.repeats
        if self.is_cut:
            self._factor = 1.0
        if self._factor != 1.0 and not self._handles:
            self._hook()

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._nodes = [], []

    def watch_outputs(self, module: nn.Module, arguments: object, outputs: object) -> None:
        """A hook of the model: gradients end at its outputs while `is_cut`."""

        def cut(gradient: torch.Tensor) -> torch.Tensor | None:
            return torch.zeros_like(gradient) if self.is_cut else None

        for output in tensors_in(outputs):
            if output.requires_grad:
                output.register_hook(cut)  # type: ignore[no-untyped-call]

    def mean_loss(self, loss: Any) -> Any:
        """The loss over all ranks' samples, from this rank's: a tensor or a number; None stays None."""
        if not isinstance(loss, torch.Tensor):
            return None if loss is None else float(self.mean_loss(torch.tensor(loss, dtype=torch.float64)))
        total = loss.detach().clone().reshape(1) * self.share
        if self.share == 0.0:
            total.zero_()  # a repeated batch may have given NaN
        self._comm.all_reduce(total).wait()
        return total.reshape(loss.shape)

    def _scaled_share(self) -> float:
        if self._is_sum:
            return float(self._size) if self._own > 0 else 0.0
        return self._own * self._size / self._all if self._all > 0 else 0.0

    def _hook(self) -> None:
        with torch.enable_grad():
            self._nodes = [get_gradient_edge(p).node for p in self._replica.trained]
        self._handles = [node.register_prehook(self._multiply) for node in self._nodes]

    def _multiply(self, gradients: Sequence[torch.Tensor | None]) -> Any:
        """What autograd is about to add to a parameter's `grad`."""
        factor = self._factor
        if factor == 1.0:
            return None
        if factor == 0.0:  # not 0 · gradient: the mean over no tokens is NaN
            return tuple(None if g is None else torch.zeros_like(g) for g in gradients)
        return tuple(None if g is None else g * factor for g in gradients)
