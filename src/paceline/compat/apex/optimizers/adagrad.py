"""`FusedAdagrad`: gradients divided by the root of the sum of their squares."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from paceline.compat.apex.optimizers.base import FusedOptimizer, Parameters


class FusedAdagrad(FusedOptimizer):
    """Adagrad with L2 regularisation, or with decoupled weight decay (`adagrad_w_mode=True`).

    Source: Duchi, Hazan and Singer, JMLR 2011.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate; default 1e-2.
        eps: Added to the root of the sum; default 1e-10.
        weight_decay: Its factor; default 0.
        set_grad_none: Whether `zero_grad` removes gradients; default yes.
        adagrad_w_mode: Decoupled weight decay; default: added to the gradient.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        set_grad_none: bool = True,
        adagrad_w_mode: bool = False,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "eps": eps, "weight_decay": weight_decay}, set_grad_none=set_grad_none
        )
        self.adagrad_w_mode = adagrad_w_mode

    def update(self, group: dict[str, Any], parameter: Tensor, gradient: Tensor) -> Tensor:
        decay = group["weight_decay"]
        if decay and not self.adagrad_w_mode:
            gradient = gradient + decay * parameter
        kept = self.buffer("sum")
        total = kept.float() + gradient.square()
        kept.copy_(total)
        change: Tensor = gradient / (total.sqrt() + group["eps"])
        if decay and self.adagrad_w_mode:
            change = change + decay * parameter
        return change
