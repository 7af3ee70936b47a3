"""BMUF: blockwise model-update filtering, parameter averaging with block momentum.

Source: Chen & Huo, ICASSP 2016. With G = mean(W_i) − W_start: Δ ← ηΔ + ςG, W_g ← W_g + Δ. Workers start the
next block from W_g (classical block momentum, CBM) or from W_g + ηΔ (Nesterov, NBM). The final model is W_g.

Cost: the model once per `period` minibatches.   [tested]
"""

from __future__ import annotations

from typing import Any

from paceline.errors import ConfigError
from paceline.spec import Spec
from paceline.strategies.outer.optimizer import OuterStrategy
from paceline.types import Communicator


class BMUF(OuterStrategy):
    """Block momentum η (default 1 − 1/N), block learning rate ς; local momentum restarts per block."""

    advice = (
        "local_sgd that does not lose speed with many workers: block momentum makes up for the averaging."
    )
    ends_behind = True

    def __init__(
        self,
        *,
        period: int = 16,
        momentum: float | None = None,
        rate: float = 1.0,
        nesterov: bool = True,
        reset_optimizer: bool = True,
        codec: str | Spec | None = None,
    ) -> None:
        inertia = 0.0 if momentum is None else momentum
        super().__init__(period=period, rate=rate, momentum=inertia, nesterov=nesterov, codec=codec)
        self._momentum_follows_size = momentum is None
        self._reset_optimizer = reset_optimizer
        if not isinstance(nesterov, bool):
            raise ConfigError(f"nesterov={nesterov!r}: true (NBM) or false (CBM) expected")

    def attach(self, replica: Any, comm: Communicator) -> None:
        """Choose η = 1 − 1/N unless it was given."""
        if self._momentum_follows_size:
            self._momentum = 1.0 - 1.0 / comm.size
        super().attach(replica, comm)

    def start_block(self) -> None:
        """Local momentum belongs to the block that is over."""
        if self._reset_optimizer:
            for key, tensor in self.replica.optimizer_state():
                if key == "momentum_buffer":
                    tensor.zero_()
