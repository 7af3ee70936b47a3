"""The forward passes of a model: which batches each got, and which of them a backward pass goes through.

One backward pass may go through several forward passes (losses that are added up), or not through the last
one (a loss that was thrown away, a look at the next batch). The gradient that reaches an output tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.autograd import Variable

from paceline.train.data.handed_out import HandedBatch, tensors_in


@dataclass(frozen=True)
class ForwardPass:
    """One call of a model, with gradients.

    Attributes:
        batches: Those that it got; if that is not certain, those that it may have got.
        is_certain: Whether the tensors of the batches were recognised.
    """

    batches: Sequence[HandedBatch]
    is_certain: bool


class ForwardPasses:
    """What one model got in the forward passes that the backward pass goes through, which runs now."""

    def __init__(self) -> None:
        self._begun: ForwardPass | None = None
        self._latest: ForwardPass | None = None
        self._reached: list[ForwardPass] = []

    def begin(self, one: ForwardPass | None) -> None:
        """The model is called; None: without gradients, or without a loader."""
        self._begun = one

    def watch_outputs(self, module: object, arguments: object, outputs: object) -> None:
        """A hook of the model: its outputs tell when a gradient reaches them."""
        one, self._begun = self._begun, None
        if one is None:
            return
        self._latest = one
        reached = self._reached

        def tell(gradient: torch.Tensor) -> None:
            if not reached:  # at the end of this run of the engine, perhaps torch.autograd.grad, all is over
                Variable._execution_engine.queue_callback(reached.clear)  # noqa: SLF001
            if one not in reached:
                reached.append(one)

        for output in tensors_in(outputs):
            if output.grad_fn is not None:
                output.register_hook(tell)  # type: ignore[no-untyped-call]

    def reached(self) -> Sequence[ForwardPass]:
        """Those that the backward pass goes through; the last one if no output told anything."""
        return self._reached or ([self._latest] if self._latest is not None else [])
