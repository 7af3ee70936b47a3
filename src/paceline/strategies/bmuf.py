"""BMUF: blockwise model-update filtering, parameter averaging with block momentum.

With G = mean(W_i) − W_start: Δ ← ηΔ + ςG, W_g ← W_g + Δ. Workers start the next block from W_g (classical
block momentum, CBM) or from W_g + ηΔ (Nesterov, NBM). The final model is W_g.

Cost: the model once per `period` minibatches.   [tested]
"""

from __future__ import annotations

from paceline.errors import ConfigError
from paceline.spec import Spec
from paceline.strategies.outer.strategy import OuterStrategy


class BMUF(OuterStrategy):
    """Parameter averaging every `period` minibatches, with block momentum η and block learning rate ς.

    Args:
        period: Minibatches of a block, at least 1; default 16; if a thirtieth of the run, or four
            times the samples of a worker's minibatch, is less, then that (`job.epochs` knows both). A
            larger one sends less.
        momentum: Block momentum η, from 0 to below 1; default 0.5. The paper's 1 − 1/N makes up for the
            averaging of N updates where each worker has a full batch of its own: raise it towards that
            then, with rate 1. Where N workers share one batch, that multiplies the learning rate by N, and
            training diverges. 0 is `local_sgd`.
        rate: Block learning rate ς, above 0; default 1 − η, which makes blocks move as far as the workers'
            mean. 1 is the paper's, for η = 1 − 1/N.
        nesterov: True (default): workers start a block from W_g + ηΔ (NBM). False: from W_g (CBM).
        reset_optimizer: Zero the local SGD momentum at the start of a block, as in the paper; default true.
            False keeps it: local momentum then carries on from before the outer step.
        codec: Encodes a worker's progress in a block, e.g. `int8`; default none.

    Raises:
        ConfigError: An argument outside of its range, or a codec that does not exist.

    Example:
        `bmuf(period=16, momentum=0.875, rate=1)`

    Source: Chen & Huo, ICASSP 2016.
    """

    advice = "local_sgd with block momentum: restores the step size that averaging takes from full batches."
    ends_with_global_model = True

    def __init__(
        self,
        *,
        period: int | None = None,
        momentum: float = 0.5,
        rate: float | None = None,
        nesterov: bool = True,
        reset_optimizer: bool = True,
        codec: str | Spec | None = None,
    ) -> None:
        super().__init__(
            period=period,
            rate=rate,
            momentum=momentum,
            nesterov=nesterov,
            codec=codec,
        )
        if not isinstance(nesterov, bool):
            raise ConfigError(f"nesterov={nesterov!r}: true (NBM) or false (CBM) expected")
        self._reset_optimizer = reset_optimizer

    def start_block(self) -> None:
        """Zero the local momentum: it belongs to the block that is over."""
        if self._reset_optimizer:
            for key, tensor in self.replica.optimizer_state():
                if key == "momentum_buffer":
                    tensor.zero_()
