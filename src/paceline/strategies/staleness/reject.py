"""Updates that are too late are dropped, and counted.

Source: the cut-off of FedAsync (Xie et al. 2019) and of most production parameter servers.
"""

from __future__ import annotations

from paceline.strategies.base.staleness_policy import StalenessPolicy, whole


class Reject(StalenessPolicy):
    """Use updates of staleness ≤ max only."""

    advice = "Guards against stragglers' very old updates; join it: inverse+reject(max=64)."

    def __init__(self, *, max: int) -> None:
        self._max = whole("max", max, least=0)

    def accepts(self, staleness: int) -> bool:
        """s ≤ max."""
        return staleness <= self._max
