"""What a comparison measured, and the four criteria made of it. Plain data: JSON in, JSON out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Point:
    """One evaluation on the whole test set, during training."""

    epoch: float
    seconds: float
    """Training time so far; evaluation does not count."""
    samples: int
    """Samples trained on so far, over all workers."""
    bytes_sent: int
    """Payload bytes that all workers sent so far for training."""
    accuracy: float
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Trial:
    """One strategy's training, as measured."""

    strategy: str
    workers: int
    curve: tuple[Point, ...]
    """Begins before the first step and ends after the last one."""
    wait_s: float
    """Seconds that a worker waited for others during training, mean over workers."""
    advice: str = ""
    model_parameters: int = 0
    parameters_sha256: str = ""
    """Of worker 0's final parameters, to tell whether two runs ended in the same bits."""
    staleness: dict[str, Any] = field(default_factory=dict)
    """`staleness_mean`, `staleness_max`, `staleness_histogram`, … of an asynchronous method."""
    codec: dict[str, float] = field(default_factory=dict)
    """Bytes by cause, encode seconds and extra memory, summed over the workers; empty without a codec."""

    @property
    def seconds(self) -> float:
        """Training time in all."""
        return self.curve[-1].seconds

    @property
    def samples_per_s(self) -> float:
        """Throughput, over all workers."""
        return self.curve[-1].samples / max(self.seconds, 1e-9)

    @property
    def seconds_per_epoch(self) -> float:
        """Training time of one pass over the training set."""
        return self.seconds / max(self.curve[-1].epoch, 1e-9)

    @property
    def best_accuracy(self) -> float:
        """The best of all evaluations."""
        return max(p.accuracy for p in self.curve)

    @property
    def bytes_sent_per_sample(self) -> float:
        """Payload bytes that all workers together sent, per sample trained on."""
        return self.curve[-1].bytes_sent / max(self.curve[-1].samples, 1)

    def accuracy_at_seconds(self, budget_s: float) -> float:
        """Accuracy of the last evaluation within `budget_s` seconds of training."""
        return [p for p in self.curve if p.seconds <= budget_s * (1 + 1e-9)][-1].accuracy

    def accuracy_at_epochs(self, budget: float) -> float:
        """Accuracy of the last evaluation within `budget` epochs."""
        return [p for p in self.curve if p.epoch <= budget * (1 + 1e-9)][-1].accuracy


@dataclass(frozen=True)
class Comparison:
    """Several strategies on one task under equal conditions."""

    task: str
    trials: tuple[Trial, ...]
    epochs: float
    batch_size: int
    """Samples per step over all workers."""
    threads: int
    """Intra-op threads of every worker."""
    seed: int
    train_samples: int
    test_samples: int
    seconds_budget: float
    epochs_budget: float
    fabric: str = ""
    learning_rate: float | None = None
    simulated: dict[str, Any] | None = None
    """Compute times, network and faults of a simulated cluster (seconds are then virtual); else None."""
    hardware: dict[str, Any] = field(default_factory=dict)

    def results(self) -> list[dict[str, Any]]:
        """One dict per strategy, in the order they ran: the rows of table and JSON."""
        return [self._row(t) for t in self.trials]

    def _row(self, trial: Trial) -> dict[str, Any]:
        return {
            "strategy": trial.strategy,
            "workers": trial.workers,
            "samples_per_s": trial.samples_per_s,
            "seconds_per_epoch": trial.seconds_per_epoch,
            "best_accuracy": trial.best_accuracy,
            "accuracy_at_seconds": trial.accuracy_at_seconds(self.seconds_budget),
            "accuracy_at_epochs": trial.accuracy_at_epochs(self.epochs_budget),
            "bytes_sent_per_sample": trial.bytes_sent_per_sample,
            "wait_s": trial.wait_s,
            "curve": [_point(p) for p in trial.curve],
            "advice": trial.advice,
            "model_parameters": trial.model_parameters,
            "parameters_sha256": trial.parameters_sha256,
            "staleness_mean": trial.staleness.get("staleness_mean"),
            "staleness_max": trial.staleness.get("staleness_max"),
            "staleness_histogram": trial.staleness.get("staleness_histogram"),
            "staleness_per_worker": trial.staleness.get("staleness_per_worker"),
            **{k: v for k, v in trial.staleness.items() if not k.startswith("staleness_")},
            **({"codec": trial.codec} if trial.codec else {}),
        }

    def to_json(self) -> str:
        """The rows under "results", and the conditions beside them."""
        conditions = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("trials",)
        }
        return json.dumps({"results": self.results(), **conditions}, indent=2) + "\n"

    def save(self, path: Path) -> None:
        """Write the JSON; folders are made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_json())


def _point(point: Point) -> dict[str, Any]:
    plain = dataclasses.asdict(point)
    return {**plain.pop("metrics"), **plain}


def fastest_seconds(trials: Sequence[Trial]) -> float:
    """The wall-clock budget when none is given: the training time of the fastest strategy."""
    return min(t.seconds for t in trials)
