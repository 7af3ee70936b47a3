"""The server collects c updates from any workers and applies their mean.

Mean staleness in server updates is (N − 1)/c when workers pull right after they push.
"""

from __future__ import annotations

from paceline.spec import whole_number
from paceline.strategies.base.staleness_policy import StalenessPolicy


class Softsync(StalenessPolicy):
    """Apply the mean of every c updates.

    Args:
        c: Updates that are collected, at least 1; required. 1 is naive asynchronous SGD, N nearly
            synchronous. A larger c lowers noise and staleness, and the number of steps.

    Raises:
        ConfigError: c below 1.

    Example:
        `parameter_server(staleness=softsync(c=4)+inverse)`

    Source: Zhang et al., Staleness-aware Async-SGD, IJCAI 2016 (their n-softsync is c = ⌊N/n⌋).
    """

    advice = "Less noise and staleness than single updates; best with inverse: softsync(c=4)+inverse."

    def __init__(self, *, c: int) -> None:
        self.group = whole_number("softsync: c", c, least=1)
