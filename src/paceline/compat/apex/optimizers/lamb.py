"""`FusedLAMB`: Adam's direction, with a length that the parameter's own norm sets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paceline.compat.apex.optimizers.base import FusedOptimizer, Parameters, corrections, refuse_amsgrad
from paceline.errors import ConfigError


class FusedLAMB(FusedOptimizer):
    """LAMB: the update of each tensor is scaled by the ratio of its norm to the update's.

    All gradients are first divided so that their common norm is at most `max_grad_norm`. Without
    `use_nvlamb`, groups without weight decay keep the plain learning rate. Gradients are left as they are.

    Source: You et al., ICLR 2020.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate; default 1e-3.
        bias_correction: Whether moments are divided by 1 − βᵗ; default yes.
        betas: Decay of the first and second moment; default (0.9, 0.999).
        eps: Added to the square root of the second moment; default 1e-6.
        weight_decay: Its factor; default 0.01.
        amsgrad: Refused, as in Apex.
        adam_w_mode: Decoupled weight decay; False: added to the gradient. Default True.
        grad_averaging: Whether the gradient enters the first moment times 1 − β₁; default yes.
        set_grad_none: Whether `zero_grad` removes gradients; default yes.
        max_grad_norm: Greatest norm of all gradients together, above 0; float("inf"): not clipped. Default 1.
        use_nvlamb: Scale also the updates of groups without weight decay; default no.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        amsgrad: bool = False,
        adam_w_mode: bool = True,
        grad_averaging: bool = True,
        set_grad_none: bool = True,
        max_grad_norm: float = 1.0,
        use_nvlamb: bool = False,
    ) -> None:
        refuse_amsgrad("FusedLAMB", amsgrad)
        if not max_grad_norm > 0:
            raise ConfigError(
                f"FusedLAMB(max_grad_norm={max_grad_norm}): a number above 0 expected; "
                'float("inf") clips nothing'
            )
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "grad_averaging": grad_averaging,
            "max_grad_norm": max_grad_norm,
        }
        super().__init__(params, defaults, set_grad_none=set_grad_none)
        self.adam_w_mode, self.use_nvlamb = adam_w_mode, use_nvlamb
        self._clip: Tensor

    def prepare(self) -> None:
        norms = [torch.linalg.vector_norm(g) for g in self.gradients()]
        if norms:
            norm = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
            # Not clamp: what is not a number stays so, and reaches the parameters as in Apex.
            self._clip = torch.where(norm > (most := self.defaults["max_grad_norm"]), norm / most, 1.0)

    def update(self, group: dict[str, Any], parameter: Tensor, gradient: Tensor) -> Tensor:
        beta1, beta2 = group["betas"]
        decay = group["weight_decay"]
        gradient = gradient / self._clip.to(gradient.device)
        if decay and not self.adam_w_mode:
            gradient = gradient + decay * parameter
        first, second = self.buffer("exp_avg"), self.buffer("exp_avg_sq")
        share = 1 - beta1 if group["grad_averaging"] else 1.0
        new_first = beta1 * first.float() + share * gradient
        new_second = beta2 * second.float() + (1 - beta2) * gradient.square()
        first.copy_(new_first)
        second.copy_(new_second)
        correction1, correction2 = corrections(group)
        change: Tensor = (new_first / correction1) / ((new_second / correction2).sqrt() + group["eps"])
        if decay and self.adam_w_mode:
            change = change + decay * parameter
        if not decay and not self.use_nvlamb:
            return change
        own, its = torch.linalg.vector_norm(parameter), torch.linalg.vector_norm(change)
        ratio = torch.where((own != 0) & (its != 0), own / its, 1.0)
        return ratio * change


class FusedMixedPrecisionLamb:
    """Refused: `FusedLAMB` on float32 parameters under `amp.initialize` does the same."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        raise ConfigError(
            "FusedMixedPrecisionLamb: use FusedLAMB on float32 parameters with amp.initialize, or wrap it in "
            "fp16_utils.FP16_Optimizer"
        )
