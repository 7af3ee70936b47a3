"""The forward passes of a model: which batches each got, and which of them a backward pass goes through.

One backward pass may go through several forward passes (losses that are added up), or not through the last
one (a loss that was thrown away, a look at the next batch). The gradient that reaches an output tells.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.autograd import Variable

from paceline.train.data.handed_out import HandedBatch, tensors_in

_MOST = 256
"""Forward passes to remember between two backward passes."""


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
    """What one model got in the forward passes that the backward pass goes through, which runs now.

    Args:
        on_reached: A bound method, called when a gradient reaches the outputs of a forward pass.
    """

    def __init__(self, on_reached: Callable[[ForwardPass], object]) -> None:
        self._on_reached = weakref.WeakMethod(on_reached)
        self._begun: ForwardPass | None = None
        self._latest: ForwardPass | None = None
        self._reached: list[ForwardPass] = []
        self._all: deque[ForwardPass] = deque(maxlen=_MOST)  # since the last backward pass
        self._hidden: deque[ForwardPass] = deque(maxlen=_MOST)  # those of them whose outputs cannot tell

    def begin(self, one: ForwardPass | None) -> None:
        """The model is called; None: without gradients, or without a loader."""
        self._begun = one

    def watch_outputs(self, module: object, arguments: object, outputs: object) -> None:
        """A hook of the model: its outputs tell when a gradient reaches them."""
        one, self._begun = self._begun, None
        if one is None:
            return
        self._latest = one
        tensors = tensors_in(outputs)
        for passes in (self._all, *([] if tensors else [self._hidden])):
            if not passes or passes[-1].batches != one.batches:
                passes.append(one)
        reached, on_reached = self._reached, self._on_reached

        def tell(gradient: torch.Tensor) -> None:
            if not reached:  # at the end of this run of the engine, perhaps torch.autograd.grad, all is over
                Variable._execution_engine.queue_callback(reached.clear)  # noqa: SLF001
            if one not in reached:
                reached.append(one)
                if (call := on_reached()) is not None:
                    call(one)

        for output in tensors:
            if output.grad_fn is not None:
                output.register_hook(tell)  # type: ignore[no-untyped-call]

    def trained(self) -> Sequence[ForwardPass]:
        """Those that the backward pass, which begins now, goes through, or may go through.

        If no output tells anything (a loss on what a hook inside the model took, a penalty on gradients)
        it may be any since the last backward pass; after none, the last one once more.
        """
        may_be = [*self._reached, *self._hidden] if self._reached else list(self._all)
        self._all.clear()
        self._hidden.clear()
        return may_be or ([self._latest] if self._latest is not None else [])
