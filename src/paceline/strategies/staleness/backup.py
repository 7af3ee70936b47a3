"""K-sync: a step ends when k of the N updates have arrived; the late ones are dropped and counted."""

from __future__ import annotations

from paceline.spec import whole_number
from paceline.strategies.base.staleness_policy import StalenessPolicy


class Backup(StalenessPolicy):
    """Apply the mean of the first k updates of a step, and drop the late ones.

    Args:
        k: Updates that end a step, from 1 to the number of workers N; required. N is bulk synchronous. N − 1
            or N − 2 leaves out the stragglers; fewer waste more work.

    Raises:
        ConfigError: k below 1.

    Example:
        `parameter_server(staleness=backup(k=6))`

    Source: Chen et al., Revisiting Distributed Synchronous SGD, 2016; Dutta et al., AISTATS 2018.
    """

    advice = "Synchronous quality without waiting for the slowest: k a little below the number of workers."
    waits = True

    def __init__(self, *, k: int) -> None:
        self.group = whole_number("backup: k", k, least=1)

    def accepts(self, staleness: int) -> bool:
        return staleness == 0  # computed on the current step's weights
