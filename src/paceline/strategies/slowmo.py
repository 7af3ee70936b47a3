"""SlowMo: slow momentum over blocks of local SGD.

Source: Wang et al., ICLR 2020. u ← βu + (x_start − mean(x_i))/γ, x ← x_start − αγu; with a constant inner
learning rate γ it drops out, and this is outer SGD with rate α and momentum β.

Cost: the model once per `period` minibatches.   [tested]
"""

from __future__ import annotations

from paceline.spec import Spec
from paceline.strategies.outer.optimizer import OuterStrategy


class SlowMo(OuterStrategy):
    """Outer heavy-ball SGD every `period` minibatches."""

    advice = "local_sgd with slow momentum: better accuracy at the same period; 0.5 to 0.7 is usual."
    ends_behind = True

    def __init__(
        self,
        *,
        period: int = 12,
        rate: float = 1.0,
        momentum: float = 0.5,
        codec: str | Spec | None = None,
    ) -> None:
        super().__init__(period=period, rate=rate, momentum=momentum, nesterov=False, codec=codec)

    def start_block(self) -> None:
        """Inner state stays."""
