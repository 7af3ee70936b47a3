"""Late updates count less, by a power of your choice: λ(s) = (1 + s)^−a.

Source: Xie et al., Asynchronous Federated Optimization (FedAsync), 2019.
"""

from __future__ import annotations

from paceline.errors import ConfigError
from paceline.strategies.base.staleness_policy import StalenessPolicy


class Polynomial(StalenessPolicy):
    """λ(s) = (1 + s)^−a."""

    advice = "Between constant (a=0) and inverse (a=1)."

    def __init__(self, *, a: float = 0.5) -> None:
        if not a >= 0:
            raise ConfigError(f"a={a}: at least 0 expected")
        self._a = a

    def scale(self, staleness: int) -> float:
        """(1 + s)^−a."""
        return float((1 + staleness) ** -self._a)
