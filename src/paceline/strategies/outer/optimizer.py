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

import torch


class OuterSGD:
    """State and step of the outer optimizer on a list of flat tensors.

    Args:
        start: The model at the start of the first block; cloned.
        rate: Outer learning rate, above 0.
        momentum: Factor of the momentum buffer, from 0 to below 1.
        nesterov: Nesterov's momentum instead of the classical one.
    """

    def __init__(
        self, start: Sequence[torch.Tensor], *, rate: float, momentum: float, nesterov: bool
    ) -> None:
        self.start = [t.clone() for t in start]
        self.buffer = [torch.zeros_like(t) for t in start]
        self._rate, self._momentum, self._nesterov = rate, momentum, nesterov

    def step(self, means: Sequence[torch.Tensor]) -> None:
        """Move `start`, given the means of the replicas."""
        for start, buffer, mean in zip(self.start, self.buffer, means, strict=True):
            gradient = start - mean
            buffer.mul_(self._momentum).add_(gradient)
            step = gradient.add_(buffer, alpha=self._momentum) if self._nesterov else buffer
            start.sub_(step, alpha=self._rate)

    def global_model(self) -> list[torch.Tensor]:
        """Return W_g, which is `start` without the look-ahead of Nesterov's momentum, as new tensors."""
        if not self._nesterov:
            return [t.clone() for t in self.start]
        ahead = self._rate * self._momentum
        return [t.add(b, alpha=ahead) for t, b in zip(self.start, self.buffer, strict=True)]
