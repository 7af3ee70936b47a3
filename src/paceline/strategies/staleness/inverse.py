"""Late updates count less: λ(s) = λ0 / max(1, s).

Source: Zhang et al., Staleness-aware Async-SGD, IJCAI 2016.
"""

from __future__ import annotations

from paceline.strategies.base.staleness_policy import StalenessPolicy


class Inverse(StalenessPolicy):
    """λ(s) = 1 / max(1, s); with `plus_one` the other rule in use, 1 / (s + 1)."""

    advice = "The default choice: keeps the learning rate of synchronous SGD usable at any number of workers."

    def __init__(self, *, plus_one: bool = False) -> None:
        self._plus_one = plus_one

    def scale(self, staleness: int) -> float:
        """1 / max(1, s), or 1 / (s + 1)."""
        return 1.0 / (staleness + 1 if self._plus_one else max(1, staleness))
