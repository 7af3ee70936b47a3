"""FASGD: steps are divided by a moving estimate of the updates' standard deviation, and by staleness.

    n ← γn + (1−γ)g²     b ← γb + (1−γ)g     v ← βv + (1−β)·√(n − b² + ε)     step ← step / v

This follows the paper's prose, which its equation (it averages 1/√…) and its code contradict;
`average_inverse` follows the equation. v is taken relative to its mean over the shard's coordinates that
were ever updated, so that the learning rate keeps its meaning.
"""

from __future__ import annotations

from typing import Any

import torch

from paceline.errors import ConfigError
from paceline.strategies.base.staleness_policy import StalenessPolicy

_LEAST = 0.1  # a coordinate that hardly varies becomes at most ten times faster


class FASGD(StalenessPolicy):
    """Damp coordinates whose updates are noisy, and late updates by 1 / max(1, s).

    Args:
        gamma: Decay of the moving averages of updates and their squares (the paper's γ), in [0, 1); default
            0.9. Raise it for noisy gradients.
        beta: Decay of the moving average of the deviation (the paper's β), in [0, 1); default 0.9.
        epsilon: Added to the variance, above 0; default 1e-12. Raise it when updates are near float32's
            resolution.
        average_inverse: Average 1/deviation, as in the paper's equation; default false, as in its prose.

    Raises:
        ConfigError: An argument outside of its range.

    Example:
        `parameter_server(staleness=fasgd(gamma=0.95))`

    Source: Odena, Faster Asynchronous SGD, 2016.
    """

    advice = "Adaptive per coordinate; for gradients that differ much in scale between layers."

    def __init__(
        self,
        *,
        gamma: float = 0.9,
        beta: float = 0.9,
        epsilon: float = 1e-12,
        average_inverse: bool = False,
    ) -> None:
        if not (0 <= gamma < 1 and 0 <= beta < 1 and epsilon > 0):
            raise ConfigError(f"gamma={gamma}, beta={beta} in [0, 1) and epsilon={epsilon} > 0 expected")
        self._gamma, self._beta, self._epsilon = gamma, beta, epsilon
        self._average_inverse = average_inverse
        self._state: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def scale(self, staleness: int) -> float:
        return 1.0 / max(1, staleness)

    def transform(self, index: int, update: torch.Tensor) -> None:
        if index not in self._state:
            self._state[index] = (update * update, update.clone(), torch.zeros_like(update))
        n, b, v = self._state[index]
        is_first = not bool(v.any())
        n.lerp_(update * update, 1 - self._gamma)
        b.lerp_(update, 1 - self._gamma)
        deviation = (n - b * b).clamp_(min=0).add_(self._epsilon).sqrt_()
        target = deviation.reciprocal() if self._average_inverse else deviation
        v.copy_(target) if is_first else v.lerp_(target, 1 - self._beta)
        # Padding between tensors, and what no update has reached, would shift the mean.
        has_moved = n > 0
        if not bool(has_moved.any()):
            return
        relative = v / v[has_moved].mean()
        if self._average_inverse:
            update.mul_(relative)
        else:
            update.div_(relative.clamp_(min=_LEAST))

    def state_dict(self) -> dict[str, Any]:
        return {str(i): list(averages) for i, averages in self._state.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state = {int(i): (n.clone(), b.clone(), v.clone()) for i, (n, b, v) in state.items()}
