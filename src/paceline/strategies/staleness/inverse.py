"""Late updates count less: λ(s) = λ0 / max(1, s)."""

from __future__ import annotations

from paceline.strategies.base.staleness_policy import StalenessPolicy


class Inverse(StalenessPolicy):
    """λ(s) = 1 / max(1, s).

    Args:
        plus_one: Use the other common rule, λ(s) = 1 / (s + 1); default false, as in the paper. It halves
            updates of staleness 1 too, so that two workers also make the step of their mean.

    Example:
        `parameter_server(staleness=inverse)`

    Source: Zhang et al., Staleness-aware Async-SGD, IJCAI 2016.
    """

    advice = "The usual choice: keeps the learning rate of synchronous SGD usable at any number of workers."

    def __init__(self, *, plus_one: bool = False) -> None:
        self._plus_one = plus_one

    def scale(self, staleness: int) -> float:
        return 1.0 / (staleness + 1 if self._plus_one else max(1, staleness))
