"""What a comparison measured, and the four criteria made of it. Plain data: JSON in, JSON out."""

from __future__ import annotations

import dataclasses
import json
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
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
    """Bytes that all workers had to send to others so far for training, by the schedules that send the fewest
    (see `comm.ledger`): alike for all methods, and on any fabric."""
    accuracy: float
    """On the test set."""
    metrics: dict[str, float] = field(default_factory=dict)
    payload_bytes: int = 0
    """Bytes that all workers handed to their communicators so far for training."""
    validation_accuracy: float | None = None
    """On the part of the training set that was held out; None without one."""


@dataclass(frozen=True)
class Trial:
    """One strategy's training, as measured."""

    strategy: str
    workers: int
    curve: tuple[Point, ...]
    """Begins before the first step and ends after the last one."""
    wait_s: float
    """Seconds that a worker waited for others during training, mean over workers."""
    threads: int = 1
    """Intra-op threads of each of its workers."""
    warning: str = ""
    """What does not suit a run of this length, and which number to change; "" if nothing."""
    advice: str = ""
    model_parameters: int = 0
    parameters_sha256: str = ""
    """Of worker 0's final parameters, to tell whether two runs ended in the same bits."""
    staleness: dict[str, Any] = field(default_factory=dict)
    """`staleness_mean`, `staleness_max`, `staleness_histogram`, … of an asynchronous method."""
    codec: dict[str, float] = field(default_factory=dict)
    """Bytes by cause, encode seconds and extra memory, summed over the workers; empty without a codec."""
    work_s: dict[str, float] = field(default_factory=dict)
    """Virtual seconds of local work by kind (encode, decode, server, arithmetic), mean over the workers;
    empty for real workers, and where it costs nothing."""
    busiest_server_s: float = 0.0
    """Virtual seconds of the worker whose server had most to do."""

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
        """The best of all evaluations on the test set; NaN only if all of them are.

        With a validation set: the test accuracy of the evaluation that was best on that set, for which the
        test set is looked at only once.
        """
        points = [p for p in self.curve if not math.isnan(p.accuracy)]
        if not points:
            return math.nan
        return max(points, key=_choice).accuracy

    @property
    def has_diverged(self) -> bool:
        """Whether the final model gives no finite number for a metric."""
        last = self.curve[-1]
        return not all(math.isfinite(value) for value in (last.accuracy, *last.metrics.values()))

    @property
    def bytes_sent_per_sample(self) -> float:
        """Bytes that a worker has to send to others for every sample of its own, mean over workers."""
        return self.curve[-1].bytes_sent / max(self.curve[-1].samples, 1)

    @property
    def payload_bytes_per_sample(self) -> float:
        """Bytes that a worker hands to its communicator for every sample of its own, mean over workers."""
        return self.curve[-1].payload_bytes / max(self.curve[-1].samples, 1)

    def accuracy_at_seconds(self, budget_s: float) -> float:
        """Accuracy after `budget_s` seconds of training, linear between the two evaluations around it."""
        return self._accuracy_at(budget_s, lambda p: p.seconds)

    def accuracy_at_epochs(self, budget: float) -> float:
        """Accuracy after `budget` epochs, linear between the two evaluations around it."""
        return self._accuracy_at(budget, lambda p: p.epoch)

    def _accuracy_at(self, budget: float, place: Callable[[Point], float]) -> float:
        """The curve's height at `budget`: a reading before it would punish who is late by a millisecond."""
        after = bisect_left(self.curve, budget, key=place)
        if after == 0 or after == len(self.curve):
            return self.curve[min(after, len(self.curve) - 1)].accuracy
        low, high = self.curve[after - 1], self.curve[after]
        share = (budget - place(low)) / (place(high) - place(low))
        return high.accuracy if share >= 1 else low.accuracy + share * (high.accuracy - low.accuracy)


@dataclass(frozen=True)
class Comparison:
    """Several strategies on one task under equal conditions."""

    task: str
    trials: tuple[Trial, ...]
    epochs: float
    batch_size: int
    """Samples per step over all workers."""
    threads: int
    """Intra-op threads of every worker where all workers train; one worker alone may have more."""
    seed: int
    train_samples: int
    test_samples: int
    seconds_budget: float
    epochs_budget: float
    fabric: str = ""
    learning_rate: float | None = None
    validation_samples: int = 0
    """Held out from the training set, to choose the best evaluation by."""
    failures: dict[str, str] = field(default_factory=dict)
    """Strategies that failed, and why; they have no trial."""
    simulated: dict[str, Any] | None = None
    """Compute times, network and faults of a simulated cluster (seconds are then virtual); else None."""
    costs: dict[str, dict[str, float]] = field(default_factory=dict)
    """What local work cost in virtual time: work → number of elements → seconds."""
    hardware: dict[str, Any] = field(default_factory=dict)

    @property
    def charges_work(self) -> bool:
        """Whether codecs, servers and outer steps took virtual time."""
        return self.simulated is not None and self.simulated.get("codec_cost", "none") != "none"

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
            "payload_bytes_per_sample": trial.payload_bytes_per_sample,
            "wait_s": trial.wait_s,
            "work_s": trial.work_s,
            "busiest_server_s": trial.busiest_server_s,
            "curve": [_point(p) for p in trial.curve],
            "threads": trial.threads,
            "warning": trial.warning,
            "has_diverged": trial.has_diverged,
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
        found = _finite({"results": self.results(), **conditions})
        return json.dumps(found, indent=2, allow_nan=False) + "\n"

    def save(self, path: Path) -> None:
        """Write the JSON; folders are made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_json())


def _choice(point: Point) -> float:
    """What the best evaluation is chosen by; one without a validation accuracy, or with NaN, never is."""
    chosen = point.accuracy if point.validation_accuracy is None else point.validation_accuracy
    return -math.inf if math.isnan(chosen) else chosen


def _finite(value: Any) -> Any:
    """The same plain data with null for NaN and infinities, which JSON cannot write."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _point(point: Point) -> dict[str, Any]:
    plain = dataclasses.asdict(point)
    return {**plain.pop("metrics"), **plain}


def fastest_seconds(trials: Sequence[Trial]) -> float:
    """The wall-clock budget when none is given: the training time of the fastest strategy."""
    return min(t.seconds for t in trials)
