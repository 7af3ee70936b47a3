"""Stale synchronous parallel: nobody reads more than s clocks ahead of the slowest live worker.

Source: Ho et al., More Effective Distributed ML via a Stale Synchronous Parallel Parameter Server, NIPS 2013.
A worker at clock t may read only if every live worker's clock is ≥ t − s. Finished, resting and dead workers
do not count. s = 0 is bulk synchronous.
"""

from __future__ import annotations

from paceline.strategies.base.staleness_policy import StalenessPolicy, whole


class Bounded(StalenessPolicy):
    """Clock gap ≤ s at every read; update staleness is then at most (2s + 1)(N − 1)."""

    advice = "Bounds how far fast workers run ahead; for clusters with occasional stragglers."

    def __init__(self, *, s: int) -> None:
        self.gap = whole("s", s, least=0)
