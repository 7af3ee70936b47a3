"""`LARC`: around any optimizer, a learning rate per tensor from the ratio of its norm to its gradient's."""

from __future__ import annotations

from typing import Any

import torch


class LARC:
    """Changes gradients so that the wrapped optimizer makes steps of LARC; its weight decay is taken over.

    Schedulers take `LARC(…).optim`.

    Source: You, Gitman and Ginsburg, 2017, arXiv:1708.03888.

    Args:
        optimizer: The optimizer to wrap.
        trust_coefficient: Step of a tensor relative to its norm; default 0.02.
        clip: The local rate limits the optimizer's; False: it multiplies it. Default True.
        eps: Added to the denominator; default 1e-8.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        trust_coefficient: float = 0.02,
        clip: bool = True,
        eps: float = 1e-8,
    ) -> None:
        self.optim = optimizer
        self.trust_coefficient, self.clip, self.eps = trust_coefficient, clip, eps

    @property
    def state(self) -> Any:
        """The optimizer's own."""
        return self.optim.state

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's own."""
        return self.optim.param_groups

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state."""
        return self.optim.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the optimizer's state."""
        self.optim.load_state_dict(state_dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as the optimizer does."""
        self.optim.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Give the optimizer one more group of parameters."""
        self.optim.add_param_group(param_group)

    def __repr__(self) -> str:
        return f"LARC({self.optim!r})"

    def step(self) -> None:
        """Scale the gradients and let the optimizer step without its weight decay."""
        decays = [group.get("weight_decay") for group in self.optim.param_groups]
        for group, decay in zip(self.optim.param_groups, decays, strict=True):
            self._scale(group, decay or 0.0)
            if decay is not None:
                group["weight_decay"] = 0.0
        try:
            self.optim.step()
        finally:
            for group, decay in zip(self.optim.param_groups, decays, strict=True):
                if decay is not None:
                    group["weight_decay"] = decay

    @torch.no_grad()
    def _scale(self, group: dict[str, Any], decay: float) -> None:
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is None:
                continue
            norm, slope = torch.linalg.vector_norm(parameter), torch.linalg.vector_norm(gradient)
            if norm == 0 or slope == 0:
                continue
            rate = self.trust_coefficient * norm / (slope + norm * decay + self.eps)
            if self.clip:
                rate = torch.clamp(rate / group["lr"], max=1.0)
            gradient.add_(parameter, alpha=decay).mul_(rate)
