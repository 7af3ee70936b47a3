"""One worker, no communication: the baseline that every other method must beat."""

from __future__ import annotations

from paceline.strategies.base.strategy import TrainingStrategy


class Single(TrainingStrategy):
    """Train on one worker; `prepare` refuses a job of more.

    Example:
        `single`
    """

    advice = "One worker, the baseline: choose it when no other method beats it for your model and network."
    max_workers = 1

    def traffic(self, model_bytes: int, size: int) -> float:
        return 0.0
