"""`FusedNovoGrad`: gradients divided by a moving norm per tensor, with momentum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paceline.compat.apex.optimizers.base import FusedOptimizer, Parameters, corrections, refuse_amsgrad
from paceline.errors import ConfigError


class FusedNovoGrad(FusedOptimizer):
    """NovoGrad: one second moment per tensor, which is a norm.

    Source: Ginsburg et al., 2019, arXiv:1905.11286.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate; default 1e-3.
        bias_correction: Whether moments are corrected for their start; default yes.
        betas: Decay of the momentum and of the norm; default (0.9, 0.999).
        eps: Added to the norm; default 1e-8.
        weight_decay: Its factor; default 0.
        amsgrad: Refused, as in Apex.
        reg_inside_moment: Normalise and decay before momentum, as the paper has it; default: after.
        grad_averaging: Whether the gradient enters the momentum times 1 − β₁; default yes.
        norm_type: 2, or 0 for the greatest magnitude; default 2.
        init_zero: Begin the moving norm at 0; default: at the first gradient's norm.
        set_grad_none: Whether `zero_grad` removes gradients; default yes.
    """

    float32_state = ("exp_avg_sq",)

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        reg_inside_moment: bool = False,
        grad_averaging: bool = True,
        norm_type: int = 2,
        init_zero: bool = False,
        set_grad_none: bool = True,
    ) -> None:
        refuse_amsgrad("FusedNovoGrad", amsgrad)
        if norm_type not in (0, 2):
            raise ConfigError(
                f"FusedNovoGrad(norm_type={norm_type}): 2, or 0 for the greatest magnitude, expected"
            )
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "grad_averaging": grad_averaging,
            "norm_type": norm_type,
            "init_zero": init_zero,
        }
        super().__init__(params, defaults, set_grad_none=set_grad_none)
        self.reg_inside_moment = reg_inside_moment

    def update(self, group: dict[str, Any], parameter: Tensor, gradient: Tensor) -> Tensor:
        beta1, decay = group["betas"][0], group["weight_decay"]
        correction1, correction2 = corrections(group)
        scale = self._moving_norm(group, gradient) / correction2**0.5 + group["eps"]
        share = 1 - beta1 if group["grad_averaging"] else 1.0
        if self.reg_inside_moment:
            gradient = gradient / scale + decay * parameter
        kept = self.buffer("exp_avg")
        momentum = beta1 * kept.float() + share * gradient
        kept.copy_(momentum)
        change: Tensor = momentum / correction1
        if not self.reg_inside_moment:
            change = change / scale + decay * parameter
        return change

    def _moving_norm(self, group: dict[str, Any], gradient: Tensor) -> Tensor:
        is_l2, beta2 = group["norm_type"] == 2, group["betas"][1]
        norm = torch.linalg.vector_norm(gradient, 2 if is_l2 else torch.inf)
        start = torch.zeros_like(norm) if group["init_zero"] else norm
        moving = self.buffer("exp_avg_sq", lambda _: start.clone())
        if is_l2:
            return moving.copy_((beta2 * moving.square() + (1 - beta2) * norm.square()).sqrt())
        return moving.copy_(beta2 * moving + (1 - beta2) * norm)
