"""BMUF: blockwise model-update filtering, parameter averaging with block momentum.

With G = mean(W_i) − W_start: Δ ← ηΔ + ςG, W_g ← W_g + Δ. Workers start the next block from W_g (classical
block momentum, CBM) or from W_g + ηΔ (Nesterov, NBM). The final model is W_g.

Cost: the model once per `period` minibatches.   [tested]
"""

from __future__ import annotations

from paceline.errors import ConfigError
from paceline.spec import Spec
from paceline.strategies.outer.strategy import OuterStrategy
from paceline.types import Communicator, Replica


class BMUF(OuterStrategy):
    """Parameter averaging every `period` minibatches, with block momentum η and block learning rate ς.

    Args:
        period: Minibatches of a block, at least 1; default 16. A larger one sends less.
        momentum: Block momentum η, from 0 to below 1; default 1 − 1/N with N workers, which makes up for
            the averaging of N updates. Lower it when training becomes unstable; 0 is `local_sgd`.
        rate: Block learning rate ς, above 0; default 1.
        nesterov: True (default): workers start a block from W_g + ηΔ (NBM). False: from W_g (CBM).
        reset_optimizer: Zero the local SGD momentum at the start of a block, as in the paper; default true.
            False keeps it: local momentum then carries on from before the outer step.
        codec: Encodes a worker's progress in a block, e.g. `int8`; default none.

    Raises:
        ConfigError: An argument outside of its range, or a codec that does not exist.

    Example:
        `bmuf(period=16, momentum=0.9)`

    Source: Chen & Huo, ICASSP 2016.
    """

    advice = (
        "local_sgd that does not lose speed with many workers: block momentum makes up for the averaging."
    )
    ends_with_global_model = True

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
        super().__init__(
            period=period,
            rate=rate,
            momentum=0.0 if momentum is None else momentum,
            nesterov=nesterov,
            codec=codec,
        )
        if not isinstance(nesterov, bool):
            raise ConfigError(f"nesterov={nesterov!r}: true (NBM) or false (CBM) expected")
        self._momentum_follows_size = momentum is None
        self._reset_optimizer = reset_optimizer

    def attach(self, replica: Replica, comm: Communicator) -> None:
        if self._momentum_follows_size:
            self._momentum = 1.0 - 1.0 / comm.size
        super().attach(replica, comm)

    def start_block(self) -> None:
        """Zero the local momentum: it belongs to the block that is over."""
        if self._reset_optimizer:
            for key, tensor in self.replica.optimizer_state():
                if key == "momentum_buffer":
                    tensor.zero_()
