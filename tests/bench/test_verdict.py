"""What a comparison says: budgets between evaluations, ties inside the noise, and whom it recommends."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from paceline.bench.rows import Comparison, Point, Trial, fastest_seconds
from paceline.report.page import render
from paceline.report.verdict import criteria, learned, noise, notes, pays, verdict

pytestmark = pytest.mark.contract


def trial(strategy: str, accuracies: list[float], *, seconds: float = 10.0, **different: Any) -> Trial:
    """Evaluations evenly spread over `seconds` and 10 epochs of 1,000 samples; the first before training."""
    last = len(accuracies) - 1
    curve = tuple(
        Point(10 * i / last, seconds * i / last, 10_000 * i // last, 1000 * i, accuracy)
        for i, accuracy in enumerate(accuracies)
    )
    given = {"workers": 1 if strategy == "single" else 8, "wait_s": 0.0, **different}
    return Trial(strategy, curve=curve, **given)


def comparison(*trials: Trial, **different: Any) -> Comparison:
    given: dict[str, Any] = {
        "task": "digits",
        "trials": trials,
        "epochs": 10,
        "batch_size": 32,
        "threads": 1,
        "seed": 0,
        "train_samples": 1000,
        "test_samples": 360,
        "seconds_budget": fastest_seconds(trials),
        "epochs_budget": 5.0,
    }
    return Comparison(**{**given, **different})


def test_a_budget_between_two_evaluations_is_read_between_them() -> None:
    late = trial("late", [0.1, 0.4, 0.72], seconds=10.001)
    assert late.accuracy_at_seconds(10.0) == pytest.approx(0.72, abs=1e-3), (
        "late by a millisecond, not by 5 s"
    )
    assert late.accuracy_at_epochs(2.5) == pytest.approx(0.25)
    assert late.accuracy_at_seconds(99.0) == 0.72 and late.accuracy_at_seconds(0.0) == 0.1


def test_differences_inside_the_noise_are_ties() -> None:
    found = comparison(
        trial("single", [0.1, 0.9, 0.97], seconds=30.0),
        trial("a", [0.1, 0.9, 0.975]),
        trial("b", [0.1, 0.9, 0.975 + 1 / 360], seconds=10.1),
    )
    assert noise(found) > 1 / 360
    for criterion in criteria(found):
        assert {"a", "b"} <= set(criterion.winners), f"{criterion.name}: one test sample decided"


def test_equal_speed_is_said_to_be_equal() -> None:
    found = comparison(trial("single", [0.1, 0.97]), trial("all_reduce", [0.1, 0.97], seconds=9.9))
    assert pays(found) is False
    assert "equally fast" in verdict(found) and "times as fast" not in verdict(found)


def test_who_does_not_learn_is_not_recommended_for_speed() -> None:
    found = comparison(
        trial("single", [0.1, 0.9, 0.97], seconds=30.0),
        trial("all_reduce", [0.1, 0.9, 0.97], seconds=15.0),
        trial("hasty", [0.1, 0.2, 0.24], seconds=5.0),
    )
    assert [t.strategy for t in learned(found)] == ["single", "all_reduce"]
    assert criteria(found)[0].winners == ("all_reduce",)
    said = verdict(found)
    assert said.startswith("Distributing pays here: all_reduce trains 2 times as fast")
    assert "hasty (24.00 %)" in said
    nobody = comparison(*found.trials[::2])
    assert pays(nobody) is False and "none came near" in verdict(nobody)


def test_nan_is_level_with_nobody() -> None:
    lost = trial("lost", [0.1, math.nan, math.nan])
    found = comparison(trial("single", [0.1, 0.9, 0.97], seconds=12.0), lost)
    assert lost.best_accuracy == 0.1 and lost.has_diverged
    assert all("lost" not in c.winners for c in criteria(found))
    assert "level" not in verdict(found) and "lost diverged" in " ".join(notes(found))
    assert "diverged" in render(found)
    rows = json.loads(found.to_json())["results"]
    assert rows[1]["curve"][-1]["accuracy"] is None, "NaN is not JSON"
    hopeless = comparison(trial("single", [math.nan] * 2), trial("other", [math.nan] * 2))
    assert all(not c.winners for c in criteria(hopeless)) and pays(hopeless) is False
    verdict(hopeless)


def test_warnings_and_failures_are_beside_the_figures() -> None:
    found = comparison(
        trial("single", [0.1, 0.97]),
        trial("slow", [0.1, 0.5], warning="use period=2"),
        failures={"x": "boom"},
    )
    text = " ".join(notes(found))
    assert "slow: use period=2" in text and "x failed and is not in the figures: boom" in text
    assert "use period=2" in render(found) and "boom" in render(found)


def test_a_simulation_says_what_its_codecs_would_really_take() -> None:
    coded = trial("coded", [0.1, 0.97], codec={"encode_s": 16.0})
    assert notes(comparison(coded)) == []
    (said,) = notes(comparison(coded, simulated={"compute": "constant"}))
    assert said.startswith("coded: its codec took no virtual time") and "2 s beside 10 s" in said


def test_with_a_validation_set_the_best_evaluation_is_chosen_on_it() -> None:
    chosen = ((0.1, 0.1), (0.8, 0.9), (0.9, 0.7))  # on the test set, on the validation set
    points = tuple(
        Point(i, i, 9 * i, 0, test, validation_accuracy=validation)
        for i, (test, validation) in enumerate(chosen)
    )
    found = comparison(Trial("single", 1, points, 0.0), validation_samples=100)
    assert found.trials[0].best_accuracy == 0.8
    assert criteria(found)[1].name == "Test accuracy, best on validation"
    assert criteria(comparison(found.trials[0]))[1].name == "Best on the test set"


def test_more_than_the_workers_can_give_is_doubted() -> None:
    one = trial("single", [0.1, 0.9, 0.97], seconds=200.0)
    plausible = comparison(one, trial("all_reduce", [0.1, 0.9, 0.97], seconds=25.0))
    doubtful = comparison(one, trial("all_reduce", [0.1, 0.9, 0.97], seconds=20.0))
    assert "hard to believe" not in verdict(plausible)
    assert "8 workers are more than 8 times as fast as one is hard to believe" in verdict(doubtful)
