"""What Apex's optimizers share: arithmetic in float32, step counts per group, cleared gradients."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from paceline.errors import ConfigError

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
Parameters = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class FusedOptimizer(torch.optim.Optimizer):
    """An optimizer whose rule is one method; parameters of 16 bits are updated in float32 and rounded once.

    Args:
        params: Parameters, or groups of them.
        defaults: Hyperparameters of a group that does not say its own.
        set_grad_none: Whether `zero_grad` removes gradients rather than filling them with zeros.
    """

    float32_state: ClassVar[tuple[str, ...]] = ()
    """Names of the state that stays float32 for 16-bit parameters, also through a checkpoint."""

    def __init__(self, params: Parameters, defaults: dict[str, Any], *, set_grad_none: bool) -> None:
        super().__init__(params, defaults)
        self.set_grad_none = set_grad_none
        self._now: Tensor

    @abstractmethod
    def update(self, group: dict[str, Any], parameter: Tensor, gradient: Tensor) -> Tensor:
        """Return what is subtracted from the parameter, but for the learning rate; in float32.

        Args:
            group: The hyperparameters; `step` counts the steps of the group from 1.
            parameter: The old value, in float32.
            gradient: In float32; not to be changed.
        """

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        super().zero_grad(self.set_grad_none if set_to_none is None else set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # the closure's own
        """Update the parameters that have gradients.

        Args:
            closure: Computes loss and gradients once more; default: gradients are there.

        Returns:
            What `closure` returned.

        Raises:
            ConfigError: A parameter has a dtype that Apex does not support, or a sparse gradient.
        """
        loss = None if closure is None else closure()
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    self._check(parameter)
            self.prepare()
            for group in self.param_groups:
                group["step"] = group.get("step", 0) + 1
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._now = parameter
                        wide = parameter.float()
                        change = self.update(group, wide, parameter.grad.float())
                        parameter.copy_(wide - group["lr"] * change)
        return loss

    def prepare(self) -> None:
        """Called once before the updates of a step."""
        return

    def buffer(self, name: str, value: Callable[[Tensor], Tensor] = torch.zeros_like) -> Tensor:
        """Return a state tensor of the parameter that is updated now, made from it when first needed."""
        state, parameter = self.state[self._now], self._now
        if name not in state:
            new = value(parameter.detach())
            state[name] = new.float() if name in self.float32_state else new
        found: Tensor = state[name]
        return found

    def gradients(self) -> Iterator[Tensor]:
        """Yield all gradients, in float32."""
        for group in self.param_groups:
            yield from (p.grad.float() for p in group["params"] if p.grad is not None)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # torch casts state to the parameter's dtype.
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for parameter, key in zip(group["params"], saved["params"], strict=True):
                for name in self.float32_state:
                    value = state_dict["state"].get(key, {}).get(name)
                    if isinstance(value, Tensor):
                        self.state[parameter][name] = value.detach().to(
                            parameter.device, torch.float32, copy=True
                        )

    def _check(self, parameter: Tensor) -> None:
        name = type(self).__name__
        if parameter.grad is None:
            return
        if parameter.grad.is_sparse:
            raise ConfigError(
                f"{name}: dense gradients expected, got a sparse one; use torch.optim.SparseAdam, or "
                "nn.Embedding(sparse=False)"
            )
        if parameter.dtype not in _DTYPES:
            raise ConfigError(
                f"{name}: parameters of float32, float16 or bfloat16 expected, got {parameter.dtype}; use "
                "torch.optim for others"
            )


def refuse_amsgrad(name: str, amsgrad: bool) -> None:
    """ConfigError for the AMSGrad variant, which Apex's optimizers do not have either."""
    if amsgrad:
        raise ConfigError(f"{name}(amsgrad=True): not supported, as in Apex; use torch.optim.AdamW")


def corrections(group: dict[str, Any]) -> tuple[float, float]:
    """Return the bias corrections 1 − β₁ᵗ and 1 − β₂ᵗ of a group's step, or ones."""
    if not group["bias_correction"]:
        return 1.0, 1.0
    beta1, beta2 = group["betas"]
    return 1 - beta1 ** group["step"], 1 - beta2 ** group["step"]
