"""Compute times of simulated clusters: measured on this machine, written down, repeated exactly."""

from __future__ import annotations

import time

import pytest
import torch

from paceline.bench import compute, linear_compute
from paceline.bench.compare import compare
from paceline.bench.rows import Comparison
from paceline.bench.virtual import VirtualCluster
from paceline.errors import ConfigError, PeerLost
from paceline.tasks.load import load

pytestmark = pytest.mark.contract


def test_a_measurement_is_positive_leaves_the_task_alone_and_reads_back() -> None:
    task = load("digits")
    before = [p.clone() for p in task.model.parameters()]
    state = torch.get_rng_state()
    found = compute.measure(task, few=4, many=32, threads=1, seconds=0.1)
    assert 0 < found.seconds(4) <= found.seconds(32) < 10
    assert linear_compute.parse(str(found)) == found
    assert all(torch.equal(a, b) for a, b in zip(before, task.model.parameters(), strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_one_worker_takes_the_threads_with_which_it_is_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    task, before = load("digits"), torch.get_num_threads()
    slow, plain = 3, task.loss

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        time.sleep(0.6 if torch.get_num_threads() == slow else 0.6 / torch.get_num_threads())
        return plain(outputs, targets)

    monkeypatch.setattr(task, "loss", loss)
    assert compute.fastest_threads(task, 8, 3, seconds=0.1) == 2, "of 1, 2 and 3"
    assert compute.fastest_threads(task, 8, 1) == 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    "text", ["linear(step_s=0, sample_s=0)", "linear(step_s=-1, sample_s=1)", "linear(step_s=1)"]
)
def test_costs_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        linear_compute.parse(text)
    assert linear_compute.parse("constant") is None


def test_measured_times_are_written_down_and_repeat_bit_for_bit() -> None:
    said: list[str] = []
    options = {"strategies": ["single", "all_reduce"], "workers": 4, "epochs": 1, "on_note": said.append}
    first = compare("digits", virtual=VirtualCluster(), **options)
    assert first.simulated is not None
    costs = first.simulated["compute"]
    assert costs.startswith("linear(") and any(costs in note for note in said)
    again = compare("digits", virtual=VirtualCluster(costs), **options)
    assert again.results() == first.results()
    linear = linear_compute.parse(costs)
    assert linear is not None
    single = first.trials[0]
    assert single.seconds == pytest.approx(45 * linear.seconds(32), rel=1e-6), (
        "one worker has the whole batch"
    )


def test_a_strategy_that_fails_does_not_lose_the_others() -> None:
    kept: list[Comparison] = []
    options = {"workers": 2, "epochs": 1, "on_result": kept.append}
    dies = VirtualCluster("constant", faults="kill(rank=1, at_s=0.05)")
    found = compare("digits", strategies=["all_reduce", "single"], virtual=dies, **options)
    assert [t.strategy for t in found.trials] == ["single"] and kept == [found]
    assert "rank 1 is lost" in found.failures["all_reduce"]
    with pytest.raises(PeerLost, match="strategy all_reduce"):
        compare("digits", strategies=["all_reduce"], virtual=dies, **options)


def test_a_time_budget_that_is_known_is_evaluated() -> None:
    (trial,) = compare(
        "digits",
        strategies=["all_reduce"],
        workers=2,
        epochs=2,
        seconds_budget=0.613,
        validation=0.2,
        virtual=VirtualCluster("constant"),
    ).trials
    assert min(abs(p.seconds - 0.613) for p in trial.curve) < 0.011, "within a minibatch of 10 ms"
    assert all(p.validation_accuracy is not None for p in trial.curve)
    assert trial.curve[-1].samples == 2 * 1150, "a fifth of 1,437 is held out"
