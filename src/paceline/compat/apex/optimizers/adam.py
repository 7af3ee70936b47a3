"""`FusedAdam`: AdamW by default, Adam with L2 regularisation on request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from paceline.compat.apex.optimizers.base import FusedOptimizer, Parameters, corrections, refuse_amsgrad
from paceline.errors import ConfigError


class FusedAdam(FusedOptimizer):
    """Adam with decoupled weight decay (`adam_w_mode=True`) or with L2 regularisation.

    Source: Kingma and Ba, ICLR 2015; Loshchilov and Hutter, ICLR 2019. The moments are float32.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate; default 1e-3.
        bias_correction: Whether moments are divided by 1 − βᵗ; default yes.
        betas: Decay of the first and second moment; default (0.9, 0.999).
        eps: Added to the square root of the second moment; default 1e-8.
        adam_w_mode: Decoupled weight decay; False: added to the gradient. Default True.
        weight_decay: Its factor; default 0.
        amsgrad: Refused, as in Apex.
        set_grad_none: Whether `zero_grad` removes gradients; default yes.
        capturable: Refused: use `torch.optim.AdamW(capturable=True)` for CUDA graphs.
        master_weights: Refused: keep float32 parameters under `amp.initialize`.
    """

    float32_state = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
    ) -> None:
        refuse_amsgrad("FusedAdam", amsgrad)
        if capturable:
            raise ConfigError("FusedAdam(capturable=True): use torch.optim.AdamW(capturable=True)")
        if master_weights:
            raise ConfigError(
                "FusedAdam(master_weights=True): keep float32 parameters and cast in the forward pass with "
                "amp.initialize, or use fp16_utils.FP16_Optimizer"
            )
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults, set_grad_none=set_grad_none)
        self.adam_w_mode = adam_w_mode

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        grads: object = None,
        output_params: object = None,
        scale: object = None,
        grad_norms: object = None,
        grad_scaler: object = None,
    ) -> Any:  # the closure's own
        if any(v is not None for v in (grads, output_params, scale, grad_norms, grad_scaler)):
            raise ConfigError(
                "FusedAdam.step takes a closure at most; gradients come from the parameters, and scaling "
                "from amp.scale_loss or torch.amp.GradScaler.step(optimizer)"
            )
        return super().step(closure)

    def update(self, group: dict[str, Any], parameter: Tensor, gradient: Tensor) -> Tensor:
        beta1, beta2 = group["betas"]
        decay = group["weight_decay"]
        if decay and not self.adam_w_mode:
            gradient = gradient + decay * parameter
        first = self.buffer("exp_avg").mul_(beta1).add_(gradient, alpha=1 - beta1)
        second = self.buffer("exp_avg_sq").mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        correction1, correction2 = corrections(group)
        change: Tensor = (first / correction1) / ((second / correction2).sqrt() + group["eps"])
        if decay and self.adam_w_mode:
            change = change + decay * parameter
        return change
