"""SlowMo: slow momentum over blocks of local SGD.

u ← βu + (x_start − mean(x_i))/γ, x ← x_start − αγu. A constant inner learning rate γ cancels; this is then
outer SGD with rate α and momentum β.

Cost: the model once per `period` minibatches.   [tested]
"""

from __future__ import annotations

from paceline.spec import Spec
from paceline.strategies.outer.strategy import OuterStrategy


class SlowMo(OuterStrategy):
    """Outer heavy-ball SGD every `period` minibatches.

    Args:
        period: Minibatches of a block (the paper's τ), at least 1; default 12; if a thirtieth of the run, or
            four times the samples of a worker's minibatch, is less, then that (`job.epochs` knows both). A
            larger one sends less.
        rate: Slow learning rate (the paper's α), above 0; default 1 − momentum, which makes blocks move as
            far as the workers' mean. The paper's is 1; learning slowly, or starting warm, goes with that.
        momentum: Slow momentum (the paper's β), from 0 to below 1; default 0.5. 0.5 to 0.7 is usual; lower
            it when training becomes unstable; 0 is `local_sgd`.
        codec: Encodes a worker's progress in a block, e.g. `int8`; default none.

    Raises:
        ConfigError: An argument outside of its range, or a codec that does not exist.

    Example:
        `slowmo(period=12, momentum=0.6)`

    Source: Wang et al., ICLR 2020.
    """

    advice = "local_sgd with slow momentum: better accuracy at the same period; momentum 0.5 to 0.7 is usual."
    default_period = 12
    ends_with_global_model = True

    def __init__(
        self,
        *,
        period: int | None = None,
        rate: float | None = None,
        momentum: float = 0.5,
        codec: str | Spec | None = None,
    ) -> None:
        super().__init__(period=period, rate=rate, momentum=momentum, nesterov=False, codec=codec)

    def start_block(self) -> None:
        pass  # the inner optimizer's state stays
