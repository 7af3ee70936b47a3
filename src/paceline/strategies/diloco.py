"""DiLoCo: many local (AdamW) steps, then one outer SGD step with Nesterov's momentum.

The outer step is BMUF's with Nesterov; the final model is the start of the next block. The state of the inner
optimizer stays local.

Cost: the model once per `period` minibatches.   [tested]
"""

from __future__ import annotations

from paceline.spec import Spec
from paceline.strategies.outer.strategy import OuterStrategy


class DiLoCo(OuterStrategy):
    """Outer Nesterov SGD every `period` minibatches.

    Args:
        period: Minibatches between two outer steps, at least 1; default 100. The paper uses 500 for language
            models with AdamW inside; use fewer when loss is worse than that of synchronous training.
        rate: Outer learning rate, above 0; default 0.7. 1 with momentum 0 is parameter averaging.
        momentum: Outer momentum, from 0 to below 1; default 0.9. Lower it when the outer steps overshoot:
            few outer steps in all, or a codec with large residuals such as `onebit`.
        nesterov: Nesterov's momentum; default true, as in the paper. False is classical momentum.
        codec: Encodes the pseudo-gradients, e.g. `error_feedback(codec=int4)`; default none.

    Raises:
        ConfigError: An argument outside of its range, or a codec that does not exist.

    Example:
        `diloco(period=100, codec=error_feedback(codec=int4))`

    Source: Douillard et al., DiLoCo, 2023: outer learning rate 0.7, momentum 0.9.
    """

    advice = (
        "For very slow links between sites: communicates every 100 to 500 minibatches, with AdamW inside."
    )
    ends_with_global_model = False

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
        pass  # the inner optimizer's state stays
