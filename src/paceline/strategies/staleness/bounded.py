"""Stale synchronous parallel: no worker reads more than s clocks ahead of the slowest live worker.

A worker at clock t may read only if every live worker's clock is ≥ t − s. Finished, resting and dead workers
do not count. s = 0 is bulk synchronous.
"""

from __future__ import annotations

from paceline.spec import whole_number
from paceline.strategies.base.staleness_policy import StalenessPolicy


class Bounded(StalenessPolicy):
    """Clock gap ≤ s at every read; update staleness is then at most (2s + 1)(N − 1).

    Args:
        s: Pushes by which a worker may be ahead of the slowest one when it reads, at least 0; required. 0 is
            bulk synchronous. Raise it until stragglers no longer hold up the others; staleness grows with it.

    Raises:
        ConfigError: s below 0.

    Example:
        `parameter_server(staleness=bounded(s=3)+inverse)`

    Source: Ho et al., More Effective Distributed ML via a Stale Synchronous Parallel Parameter Server, NIPS
    2013.
    """

    advice = "Bounds how far fast workers run ahead; for clusters with occasional stragglers."

    def __init__(self, *, s: int) -> None:
        self.gap = whole_number("bounded: s", s, least=0)
