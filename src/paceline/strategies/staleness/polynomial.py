"""Late updates count less, by a chosen power: λ(s) = (1 + s)^−a."""

from __future__ import annotations

from paceline.errors import ConfigError
from paceline.strategies.base.staleness_policy import StalenessPolicy


class Polynomial(StalenessPolicy):
    """λ(s) = (1 + s)^−a.

    Args:
        a: Exponent, at least 0; default 0.5. 0 is `constant`; 1 is `inverse(plus_one=true)`. Raise it when
            training diverges, lower it when late workers contribute too little.

    Raises:
        ConfigError: a below 0.

    Example:
        `parameter_server(staleness=polynomial(a=0.5))`

    Source: Xie et al., Asynchronous Federated Optimization (FedAsync), 2019.
    """

    advice = "Between constant (a=0) and inverse (a=1)."

    def __init__(self, *, a: float = 0.5) -> None:
        if not a >= 0:
            raise ConfigError(f"a={a}: at least 0 expected")
        self._a = a

    def scale(self, staleness: int) -> float:
        return float((1 + staleness) ** -self._a)
