"""Who won, and whether to distribute at all, in words."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from paceline.bench.rows import Comparison, Trial

_ACCURACY_TIE = 0.0005
_SPEED_TIE = 0.02


@dataclass(frozen=True)
class Criterion:
    """One way to rank strategies."""

    name: str
    question: str
    explanation: str
    winners: tuple[str, ...]
    """More than one if they tie: within 0.05 points of accuracy, or 2 % of speed."""
    value: str
    """The winner's, with its unit."""


def criteria(comparison: Comparison) -> list[Criterion]:
    """The four criteria with their winners."""
    seconds, epochs = comparison.seconds_budget, comparison.epochs_budget
    return [
        _criterion(
            comparison,
            "Throughput",
            "Which strategy trains on the most samples per second?",
            "Says how well the work is spread, not whether the model learns from it.",
            lambda t: t.samples_per_s,
            lambda v: f"{v:,.0f} samples/s",
            relative=True,
        ),
        _criterion(
            comparison,
            "Best accuracy",
            "Which strategy reached the best accuracy at any time?",
            "Says what averaging less often costs in the end, if anything.",
            lambda t: t.best_accuracy,
            percent,
        ),
        _criterion(
            comparison,
            f"Accuracy after {duration(seconds)}",
            f"Which strategy is best if you stop after {duration(seconds)} of training?",
            "The one that matters if you wait for the result.",
            lambda t: t.accuracy_at_seconds(seconds),
            percent,
        ),
        _criterion(
            comparison,
            f"Accuracy after {epochs:g} {'epoch' if epochs == 1 else 'epochs'}",
            f"Which strategy learned most from the same data, {epochs:g} passes over it?",
            "The one that matters if data or energy are scarce rather than time.",
            lambda t: t.accuracy_at_epochs(epochs),
            percent,
        ),
    ]


def _criterion(
    comparison: Comparison,
    name: str,
    question: str,
    explanation: str,
    measure: Callable[[Trial], float],
    show: Callable[[float], str],
    *,
    relative: bool = False,
) -> Criterion:
    best = max(measure(t) for t in comparison.trials)
    slack = best * _SPEED_TIE if relative else _ACCURACY_TIE
    winners = tuple(t.strategy for t in comparison.trials if measure(t) >= best - slack)
    return Criterion(name, question, explanation, winners, show(best))


def pays(comparison: Comparison) -> bool | None:
    """Whether a distributed strategy beats one worker in speed; None if there is nothing to compare."""
    single = [t.samples_per_s for t in comparison.trials if t.workers == 1]
    others = [t.samples_per_s for t in comparison.trials if t.workers > 1]
    return max(others) >= max(single) * (1 + _SPEED_TIE) if single and others else None


def verdict(comparison: Comparison) -> str:
    """Whether to distribute this model on this machine, judged against the single worker."""
    singles = [t for t in comparison.trials if t.workers == 1]
    others = [t for t in comparison.trials if t.workers > 1]
    if not singles or not others:
        return (
            "To learn whether to distribute at all, add the strategy single to the list (and one other): "
            "every method has to beat one worker."
        )
    single = max(singles, key=lambda t: t.samples_per_s)
    budget = comparison.seconds_budget
    fastest = max(others, key=lambda t: t.samples_per_s)
    best = max(others, key=lambda t: t.accuracy_at_seconds(budget))
    ratio = fastest.samples_per_s / single.samples_per_s
    gain = best.accuracy_at_seconds(budget) - single.accuracy_at_seconds(budget)
    if not pays(comparison):
        return (
            f"Do not distribute this model on this machine: one worker trains {1 / ratio:.1f} times as fast "
            f"as the fastest of the others ({fastest.strategy}). Its steps are too short for the time that "
            "the workers spend on exchanging it. Larger models and batches change that."
        )
    if gain < -_ACCURACY_TIE:
        return (
            f"{fastest.strategy} trains {ratio:.1f} times as fast as one worker, but learns less in the same "
            f"time: after {duration(budget)}, one worker is {-100 * gain:.2f} points of accuracy ahead. "
            "Distribute only if a longer run makes up for it."
        )
    lead = f"is {100 * gain:.2f} points of accuracy ahead of" if gain > _ACCURACY_TIE else "is level with"
    return (
        f"Distributing pays here: {fastest.strategy} trains {ratio:.1f} times as fast as one worker, and "
        f"after {duration(budget)} {best.strategy} {lead} it."
    )


def noise_points(comparison: Comparison) -> float:
    """Differences below this many points of accuracy may be chance: two standard deviations."""
    best = max(t.best_accuracy for t in comparison.trials)
    return 200 * math.sqrt(2 * best * (1 - best) / comparison.test_samples)


def percent(share: float) -> str:
    """Write 0.9712 as `97.12 %`."""
    return f"{100 * share:.2f} %"


def duration(seconds: float) -> str:
    """Seconds with two or three digits that matter, or minutes."""
    if seconds >= 600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds:.3g} s"


def amount(num_bytes: float) -> str:
    """Bytes with a unit: 1.23 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000 or unit == "GB":
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    raise AssertionError("unreachable")
