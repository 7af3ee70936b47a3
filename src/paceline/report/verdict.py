"""Who won, and whether to distribute at all, in words."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from paceline.bench.rows import Comparison, Trial

SPEED_TIE = 0.05
"""Speeds that differ by less than this share are the same: a repeated run differs by as much."""
_LEAST_GAP = 0.05
"""Nobody is said not to have learned who is less than this behind the best accuracy."""


@dataclass(frozen=True)
class Criterion:
    """One way to rank strategies."""

    name: str
    question: str
    explanation: str
    winners: tuple[str, ...]
    """More than one if they tie (see `noise` and SPEED_TIE); none if nobody has a figure."""
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
            "Says how well the work is spread. Those who learned far less than the best are left out.",
            lambda t: t.samples_per_s,
            lambda v: f"{v:,.0f} samples/s",
            relative=True,
        ),
        _criterion(
            comparison,
            best_name(comparison),
            "Which strategy reached the best accuracy at any time?",
            "Says what averaging less often costs in the end, if anything. "
            + (
                "Each strategy's model was chosen on the validation set."
                if comparison.validation_samples
                else "Chosen on the test set itself, so a little better than on new data."
            ),
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
            f"Accuracy after {passes(epochs)}",
            f"Which strategy learned most from the same data, in {passes(epochs)}?",
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
    able = learned(comparison) if relative else comparison.trials
    measured = [(t.strategy, measure(t)) for t in able if not math.isnan(measure(t))]
    if not measured:
        return Criterion(name, question, explanation, (), "no figure")
    best = max(value for _, value in measured)
    least = best / (1 + SPEED_TIE) if relative else best - noise(comparison)
    winners = tuple(strategy for strategy, value in measured if value >= least)
    return Criterion(name, question, explanation, winners, show(best))


def best_name(comparison: Comparison) -> str:
    """How reports call `Trial.best_accuracy`: what it was chosen by is a part of its meaning."""
    return "Test accuracy, best on validation" if comparison.validation_samples else "Best on the test set"


def learned(comparison: Comparison) -> list[Trial]:
    """The trials whose best accuracy is near the best of all: only they can be recommended for speed."""
    accuracies = [t.best_accuracy for t in comparison.trials if not math.isnan(t.best_accuracy)]
    least = max(accuracies, default=0.0) - max(noise(comparison), _LEAST_GAP)
    return [t for t in comparison.trials if not t.has_diverged and t.best_accuracy >= least]


def pays(comparison: Comparison) -> bool | None:
    """Whether a distributed strategy that learns beats one worker in speed; None without both kinds."""
    if not _single(comparison) or not any(t.workers > 1 for t in comparison.trials):
        return None
    others = [t for t in learned(comparison) if t.workers > 1]
    return bool(others) and _speed_ratio(comparison, others) > 1 + SPEED_TIE


def verdict(comparison: Comparison) -> str:
    """Whether to distribute this model on this machine, judged against the single worker."""
    single, all_others = _single(comparison), [t for t in comparison.trials if t.workers > 1]
    if single is None or not all_others:
        return (
            "To learn whether to distribute at all, add the strategy single to the list (and one other): "
            "every method has to beat one worker."
        )
    others = [t for t in learned(comparison) if t.workers > 1]
    if not others:
        nearest = max(all_others, key=lambda t: _or_zero(t.best_accuracy))
        return (
            "Do not distribute by these strategies with these arguments: none came near the best accuracy of "
            f"one worker, {percent(single.best_accuracy)}; {nearest.strategy} came nearest with "
            f"{percent(nearest.best_accuracy)}."
        )
    ratio, fastest = _speed_ratio(comparison, others), _fastest(others)
    if ratio < 1 / (1 + SPEED_TIE):
        text = (
            f"Do not distribute this model on this machine: one worker trains {1 / ratio:.2g} times as fast "
            f"as the fastest of the others ({fastest.strategy}). Its steps are too short for the time that "
            "the workers spend on exchanging it. Larger models and batches change that."
        )
    elif ratio <= 1 + SPEED_TIE:
        text = (
            f"Distributing this model gains nothing here: one worker and {fastest.strategy}, the fastest of "
            f"the others, train equally fast, within {100 * SPEED_TIE:g} %."
        )
    else:
        text = _gain(comparison, single, others)
    return text + _left_out(comparison, fastest)


def _gain(comparison: Comparison, single: Trial, others: list[Trial]) -> str:
    """What the accuracy at the time budget says, where workers together are faster than one."""
    budget, slack = comparison.seconds_budget, noise(comparison)
    ratio, fastest = _speed_ratio(comparison, others), _fastest(others)
    at_budget = max(t.accuracy_at_seconds(budget) for t in others)
    best = _fastest([t for t in others if t.accuracy_at_seconds(budget) >= at_budget - slack])
    gain = best.accuracy_at_seconds(budget) - _or_zero(single.accuracy_at_seconds(budget))
    if gain < -slack:
        return (
            f"{fastest.strategy} trains {ratio:.2g} times as fast as one worker, but learns less in the same "
            f"time: after {duration(budget)}, one worker is {-100 * gain:.1f} points of accuracy ahead. "
            "Distribute only if a longer run makes up for it."
        )
    lead = f"is {100 * gain:.1f} points of accuracy ahead of" if gain > slack else "is level with"
    return (
        f"Distributing pays here: {fastest.strategy} trains {ratio:.2g} times as fast as one worker, and "
        f"after {duration(budget)} {best.strategy} {lead} it." + _too_good(ratio, fastest)
    )


def _too_good(ratio: float, fastest: Trial) -> str:
    """A doubt about workers that are faster than their number explains; "" if there is none."""
    if ratio <= fastest.workers * (1 + 2 * SPEED_TIE):
        return ""
    return (
        f" That {fastest.workers} workers are more than {fastest.workers} times as fast as one is hard to "
        "believe: either other programs slowed the one down, or only a worker's share of a batch fits the "
        "caches. Compare again on a quiet machine."
    )


def _left_out(comparison: Comparison, fastest: Trial) -> str:
    """Who would have been the fastest, had it learned; "" if nobody."""
    able = {id(t) for t in learned(comparison)}
    faster = [
        f"{t.strategy} ({'diverged' if t.has_diverged else percent(t.best_accuracy)})"
        for t in comparison.trials
        if id(t) not in able and t.samples_per_s > fastest.samples_per_s * (1 + SPEED_TIE)
    ]
    return f" Faster, but left out because it learned too little: {', '.join(faster)}." if faster else ""


def _single(comparison: Comparison) -> Trial | None:
    alone = [t for t in comparison.trials if t.workers == 1]
    return _fastest(alone) if alone else None


def _fastest(trials: list[Trial]) -> Trial:
    return max(trials, key=lambda t: t.samples_per_s)


def _speed_ratio(comparison: Comparison, others: list[Trial]) -> float:
    single = _single(comparison)
    assert single is not None
    return _fastest(others).samples_per_s / single.samples_per_s


def _or_zero(accuracy: float) -> float:
    return 0.0 if math.isnan(accuracy) else accuracy


def noise(comparison: Comparison) -> float:
    """Shares of accuracy that differ by less may do so by chance: two standard deviations, or one sample."""
    best = max((_or_zero(t.best_accuracy) for t in comparison.trials), default=0.0)
    deviation = math.sqrt(2 * best * (1 - best) / comparison.test_samples)
    return max(2 * deviation, 1 / comparison.test_samples)


def notes(comparison: Comparison) -> list[str]:
    """What a reader must know beside the figures: arguments that do not suit the run, and failures."""
    found = [f"{t.strategy}: {t.warning}" for t in comparison.trials if t.warning]
    found += [
        f"{t.strategy} diverged: its final model gives no finite numbers."
        for t in comparison.trials
        if t.has_diverged
    ]
    found += [
        f"{t.strategy}: its codec took no virtual time; for real, encoding alone took each worker "
        f"{duration(t.codec['encode_s'] / t.workers)} beside {duration(t.seconds)} of training."
        for t in comparison.trials
        if comparison.simulated is not None and not comparison.charges_work and t.codec.get("encode_s")
    ]
    return found + [
        f"{strategy} failed and is not in the figures: {error}"
        for strategy, error in comparison.failures.items()
    ]


def percent(share: float) -> str:
    """Write 0.9712 as `97.12 %`, and NaN as such."""
    return "NaN" if math.isnan(share) else f"{100 * share:.2f} %"


def duration(seconds: float) -> str:
    """Seconds with two or three digits that matter, or minutes."""
    if seconds >= 600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds:.3g} s"


def passes(epochs: float) -> str:
    """Write 1 as `1 epoch`, 1.5 as `1.5 epochs`."""
    return f"{epochs:g} {'epoch' if epochs == 1 else 'epochs'}"


def amount(num_bytes: float) -> str:
    """Bytes with a unit: 1.23 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000 or unit == "GB":
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    raise AssertionError("unreachable")
