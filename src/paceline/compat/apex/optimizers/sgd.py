"""`FusedSGD`: torch's SGD, with weight decay before or after momentum."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from paceline.compat.apex.optimizers.base import FusedOptimizer, Parameters
from paceline.errors import ConfigError


class FusedSGD(FusedOptimizer):
    """Stochastic gradient descent with momentum as torch.optim.SGD has it.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate; every group needs one.
        momentum: Its factor; default 0.
        dampening: The new gradient enters the momentum times 1 − this; default 0.
        weight_decay: Factor of the L2 penalty; default 0.
        nesterov: Nesterov's momentum; default no.
        wd_after_momentum: Whether the penalty is added after momentum; default before.
        materialize_master_grads: Accepted; there are no separate master gradients here.
        set_grad_none: Whether `zero_grad` removes gradients; default no.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float | None = None,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        wd_after_momentum: bool = False,
        materialize_master_grads: bool = True,
        set_grad_none: bool = False,
    ) -> None:
        for name, value in (("lr", lr or 0), ("momentum", momentum), ("weight_decay", weight_decay)):
            if value < 0:
                raise ConfigError(f"FusedSGD({name}={value}): a number of at least 0 expected")
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ConfigError(
                f"FusedSGD(nesterov=True): a momentum and no dampening expected, got {momentum} and "
                f"{dampening}"
            )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(params, defaults, set_grad_none=set_grad_none)
        if any(group["lr"] is None for group in self.param_groups):
            raise ConfigError("FusedSGD: a learning rate expected; give lr")
        self.wd_after_momentum = wd_after_momentum

    def update(self, group: dict[str, Any], parameter: Tensor, gradient: Tensor) -> Tensor:
        decay, momentum = group["weight_decay"], group["momentum"]
        if decay and not self.wd_after_momentum:
            gradient = gradient + decay * parameter
        if momentum:
            is_first = "momentum_buffer" not in self.state[self._now]
            kept = self.buffer("momentum_buffer")
            velocity = gradient if is_first else momentum * kept.float() + (1 - group["dampening"]) * gradient
            kept.copy_(velocity)
            gradient = gradient + momentum * velocity if group["nesterov"] else velocity
        if decay and self.wd_after_momentum:
            gradient = gradient + decay * parameter
        return gradient
