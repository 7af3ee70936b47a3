"""Updates that are too late are dropped, and counted."""

from __future__ import annotations

from paceline.spec import whole_number
from paceline.strategies.base.staleness_policy import StalenessPolicy


class Reject(StalenessPolicy):
    """Use only updates of staleness ≤ max.

    Args:
        max: Largest staleness that is used, at least 0; required. A few times the number of workers drops
            only the updates of stragglers; near N − 1, the mean staleness, much work is lost.

    Raises:
        ConfigError: max below 0.

    Example:
        `parameter_server(staleness=inverse+reject(max=64))`

    Source: the cut-off of FedAsync (Xie et al. 2019) and of most production parameter servers.
    """

    advice = "Guards against stragglers' very old updates; combine it: inverse+reject(max=64)."

    def __init__(self, *, max: int) -> None:
        self._max = whole_number("reject: max", max, least=0)

    def accepts(self, staleness: int) -> bool:
        return staleness <= self._max
