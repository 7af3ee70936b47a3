"""Loss scales: one that stays, and one that falls on overflow and rises after a while without."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class LossScaler:
    """A loss scale that stays.

    Args:
        scale: The loss is multiplied by it before `backward`; default 1.
    """

    def __init__(self, scale: float = 1) -> None:
        self.cur_scale = scale

    @property
    def loss_scale(self) -> float:
        """The scale of the next loss."""
        return self.cur_scale

    def has_overflow(self, params: Iterable[Tensor]) -> bool:
        """False: a scale that stays does not look at gradients."""
        return False

    def update_scale(self, overflow: bool) -> None:
        """Take note of whether the last gradients overflowed."""

    def scale_gradient(
        self, module: object, grad_in: Sequence[Tensor], grad_out: object
    ) -> tuple[Tensor, ...]:
        """Return gradients times the scale; a module's backward hook."""
        return tuple(self.loss_scale * g for g in grad_in)

    def backward(self, loss: Tensor, retain_graph: bool = False) -> None:
        """Run backward of the scaled loss."""
        (loss * self.loss_scale).backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]


class DynamicLossScaler(LossScaler):
    """A loss scale that is divided on overflow, and multiplied after steps without.

    Args:
        init_scale: Scale of the first loss; default 2³².
        scale_factor: Divides the scale on overflow, down to 1, and multiplies it; default 2.
        scale_window: Steps without overflow before the scale rises; default 1000.
    """

    def __init__(
        self, init_scale: float = 2**32, scale_factor: float = 2.0, scale_window: int = 1000
    ) -> None:
        super().__init__(init_scale)
        self.cur_iter, self.last_overflow_iter = 0, -1
        self.scale_factor, self.scale_window = scale_factor, scale_window

    def has_overflow(self, params: Iterable[Tensor]) -> bool:
        """Whether a gradient holds an infinity or what is not a number."""
        finite = [torch.isfinite(p.grad).all() for p in params if p.grad is not None]
        # Together: one wait for the device, not one for every parameter.
        return bool(finite) and not bool(torch.stack([f.to(finite[0].device) for f in finite]).all())

    def update_scale(self, overflow: bool) -> None:
        if overflow:
            self.cur_scale = max(self.cur_scale / self.scale_factor, 1)
            self.last_overflow_iter = self.cur_iter
        elif (self.cur_iter - self.last_overflow_iter) % self.scale_window == 0:
            self.cur_scale *= self.scale_factor
        self.cur_iter += 1
