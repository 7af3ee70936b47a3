"""The outer step: SGD with momentum on the pseudo-gradient (block start − mean of the replicas).

    g = start − mean(W_i)      b ← momentum·b + g
    start ← start − rate·(g + momentum·b)   with Nesterov's momentum, else   start ← start − rate·b

Equivalences, each a test: rate 1 and momentum 0 is parameter averaging; BMUF-CBM is rate ς, momentum η;
BMUF-NBM is the same with Nesterov, which is DiLoCo's outer step; SlowMo at a constant inner learning rate is
CBM. Workers begin a block from `start`; under Nesterov it is W_g − rate·momentum·b, ahead of the global model
W_g.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from paceline import local_work
from paceline.errors import ConfigError


@dataclass(frozen=True)
class OuterArguments:
    """Rate and momentum as the user gave them, and what they are by default.

    Momentum m makes a steady step 1/(1 − m) times as large. Adam's own steps are small enough for rate 0.7
    and m = 0.9, as in DiLoCo's paper. Those of SGD, at a learning rate that suits it, are not: its outer
    steps default to the size of the workers' mean progress, rate = 1 − m.

    Args:
        rate: Outer learning rate, above 0; None: the default.
        momentum: From 0 to below 1; None: the default.

    Raises:
        ConfigError: An argument outside of its range.
    """

    rate: float | None
    momentum: float | None

    def __post_init__(self) -> None:
        rate, momentum = self.values(is_adaptive=False)
        if not rate > 0 or not 0 <= momentum < 1:
            raise ConfigError(f"rate={rate}, momentum={momentum}: rate > 0 and 0 <= momentum < 1 expected")

    @property
    def are_given(self) -> bool:
        """Whether the workers' optimizer has no say."""
        return self.rate is not None and self.momentum is not None

    def values(self, *, is_adaptive: bool) -> tuple[float, float]:
        """Rate and momentum; `is_adaptive`: the workers' optimizer divides gradients by their size."""
        momentum = self.momentum
        if momentum is None:
            momentum = 0.9 if is_adaptive else 0.5
        if self.rate is not None:
            return self.rate, momentum
        return (0.7 if is_adaptive else 1.0 - momentum), momentum


class OuterSGD:
    """State and step of the outer optimizer on a list of flat tensors.

    Args:
        start: The model at the start of the first block; cloned.
        rate: Outer learning rate, above 0; may be changed between steps.
        momentum: Factor of the momentum buffer, from 0 to below 1; may be changed between steps.
        nesterov: Nesterov's momentum instead of the classical one.
    """

    def __init__(
        self, start: Sequence[torch.Tensor], *, rate: float, momentum: float, nesterov: bool
    ) -> None:
        self.start = [t.clone() for t in start]
        self.buffer = [torch.zeros_like(t) for t in start]
        self.momentum = momentum
        self.rate, self._nesterov = rate, nesterov

    def step(self, means: Sequence[torch.Tensor]) -> None:
        """Move `start`, given the means of the replicas."""
        for start, buffer, mean in zip(self.start, self.buffer, means, strict=True):
            gradient = start - mean
            buffer.mul_(self.momentum).add_(gradient)
            step = gradient.add_(buffer, alpha=self.momentum) if self._nesterov else buffer
            start.sub_(step, alpha=self.rate)
            local_work.charge_passes([start], 5 if self._nesterov else 4)

    def global_model(self) -> list[torch.Tensor]:
        """Return W_g, which is `start` without the look-ahead of Nesterov's momentum, as new tensors."""
        if not self._nesterov:
            return [t.clone() for t in self.start]
        ahead = self.rate * self.momentum
        return [t.add(b, alpha=ahead) for t, b in zip(self.start, self.buffer, strict=True)]
