"""DiLoCo: many local (AdamW) steps, then one outer SGD step with Nesterov's momentum.

Source: Douillard et al., 2023. Outer learning rate 0.7, momentum 0.9; inner optimizer state stays local.
The outer step is BMUF's with Nesterov; the final model is the start of the next block.

Cost: the model once per `period` minibatches.   [tested]
"""

from __future__ import annotations

from paceline.spec import Spec
from paceline.strategies.outer.optimizer import OuterStrategy


class DiLoCo(OuterStrategy):
    """Outer Nesterov SGD every `period` minibatches; `codec` encodes the pseudo-gradients."""

    advice = (
        "For very slow links between sites: communicates every 100 to 500 minibatches, with AdamW inside."
    )
    ends_behind = False

    def __init__(
        self,
        *,
        period: int = 100,
        rate: float = 0.7,
        momentum: float = 0.9,
        nesterov: bool = True,
        codec: str | Spec | None = None,
    ) -> None:
        super().__init__(period=period, rate=rate, momentum=momentum, nesterov=nesterov, codec=codec)

    def start_block(self) -> None:
        """Inner state stays."""
