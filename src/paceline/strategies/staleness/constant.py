"""Every update has the same weight, however late it is: naive asynchronous SGD.

W ← W + λ0·Δ
"""

from __future__ import annotations

from paceline.strategies.base.staleness_policy import StalenessPolicy


class Constant(StalenessPolicy):
    """λ(s) = 1.

    Example:
        `parameter_server(staleness=constant)`

    Source: Dean et al., Large Scale Distributed Deep Networks (Downpour SGD), NIPS 2012.
    """

    advice = "The naive baseline; fine for a few workers, loses accuracy or diverges for many."
