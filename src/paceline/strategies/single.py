"""One worker, no communication: the baseline that every other method must beat."""

from __future__ import annotations

from paceline.strategies.base.strategy import TrainingStrategy


class Single(TrainingStrategy):
    """Train on one worker; a job of several is refused by `prepare`."""

    advice = "One worker, the baseline: choose it when no other method beats it for your model and network."
    max_workers = 1

    def traffic(self, model_bytes: int, size: int) -> float:
        """Nothing is sent."""
        return 0.0
