"""K-sync: a step is over when k of the N updates have come; the late ones are dropped and counted.

Source: Chen et al., Revisiting Distributed Synchronous SGD, 2016; Dutta et al., AISTATS 2018.
"""

from __future__ import annotations

from paceline.strategies.base.staleness_policy import StalenessPolicy, whole


class Backup(StalenessPolicy):
    """Apply the mean of the first k updates of a step; k=N is bulk synchronous."""

    advice = "Synchronous quality without waiting for the slowest: k a little below the number of workers."
    waits = True

    def __init__(self, *, k: int) -> None:
        self.group = whole("k", k, least=1)

    def accepts(self, staleness: int) -> bool:
        """Only updates that were computed on the current step's weights."""
        return staleness == 0
