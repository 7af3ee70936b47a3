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
        period: Minibatches between two outer steps, at least 1; default 100; if a thirtieth of the run, or
            four times the samples of a worker's minibatch, is less, then that (`job.epochs` knows both). The
            paper uses 500 for language models with AdamW inside; use fewer when loss is worse than that of
            synchronous training.
        rate: Outer learning rate, above 0; default 0.7, as in the paper, if the workers' optimizer is of
            Adam's kind, else 1 − momentum. 1 with momentum 0 is parameter averaging.
        momentum: Outer momentum, from 0 to below 1; default 0.9, as in the paper, if the workers' optimizer
            is of Adam's kind, else 0.5: on top of SGD, 0.7 and 0.9 diverge. Lower it when the outer steps
            overshoot, as with a codec with large residuals such as `onebit`.
        nesterov: Nesterov's momentum; default true, as in the paper. False is classical momentum.
        codec: Encodes the pseudo-gradients, e.g. `error_feedback(codec=int4)`; default none.

    Raises:
        ConfigError: An argument outside of its range, or a codec that does not exist.

    Example:
        `diloco(period=100, codec=error_feedback(codec=int4))`

    Source: Douillard et al., DiLoCo, 2023: outer learning rate 0.7, momentum 0.9.
    """

    advice = (
        "For very slow links between sites and long runs: period 100 to 500, AdamW as the inner optimizer."
    )
    default_period = 100
    follows_optimizer = True
    ends_with_global_model = False

    def __init__(
        self,
        *,
        period: int | None = None,
        rate: float | None = None,
        momentum: float | None = None,
        nesterov: bool = True,
        codec: str | Spec | None = None,
    ) -> None:
        super().__init__(period=period, rate=rate, momentum=momentum, nesterov=nesterov, codec=codec)

    def start_block(self) -> None:
        pass  # the inner optimizer's state stays
