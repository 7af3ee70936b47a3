"""Strategies learn how long a run is: defaults fit it, and what cannot suit it is said before it starts."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from workbench import FlatModel

import paceline
from paceline import registry
from paceline.bench.compare import compare
from paceline.bench.virtual import VirtualCluster
from paceline.comm.simulated.simulate import simulate
from paceline.errors import RunLengthWarning
from paceline.strategies.base.strategy import PACKAGE, class_of, make
from paceline.strategies.outer.optimizer import OuterArguments

pytestmark = pytest.mark.contract

DISTRIBUTED = [name for name in registry.names(PACKAGE) if class_of(name).max_workers is None]


@pytest.mark.parametrize("name", DISTRIBUTED)
def test_defaults_suit_an_ordinary_run(name: str) -> None:
    for num_workers in (1, 2, 8, 32):
        assert make(name).fit(450, num_workers, 32 // num_workers) == ""


@pytest.mark.parametrize("name", ["local_sgd", "bmuf", "slowmo", "diloco", "streaming_diloco"])
def test_too_few_rounds_are_named_with_the_period_that_helps(name: str) -> None:
    said = make(f"{name}(period=100)").fit(450, 8)
    assert "450 minibatches at period 100 are 4 averages" in said and "period=15" in said
    assert make(f"{name}(period=100)").fit(45_000, 8) == ""
    assert make(f"{name}(period=100)").fit(450, 1) == "", "one worker averages with nobody"
    drifting = make(f"{name}(period=16)").fit(450, 32, 1)
    assert "16 minibatches of 1 sample each" in drifting and "period=4" in drifting


@pytest.mark.parametrize("name", ["diloco", "streaming_diloco"])
def test_a_default_period_is_a_share_of_the_run(name: str) -> None:
    periods = []
    for num_steps in (450, 3000, 100_000):
        strategy = make(name)
        strategy.fit(num_steps, 8)
        periods.append(strategy.period)
    assert periods == [15, 100, 100]
    strategy = make(name)
    strategy.fit(100_000, 32, 1)
    assert strategy.period == 4, "minibatches of one sample are noisy: workers drift apart sooner"


def test_outer_steps_are_as_large_as_the_mean_unless_the_optimizer_is_adams() -> None:
    assert OuterArguments(None, None).values(is_adaptive=True) == (0.7, 0.9)
    rate, momentum = OuterArguments(None, None).values(is_adaptive=False)
    assert rate / (1 - momentum) == pytest.approx(1.0)
    assert OuterArguments(None, 0.75).values(is_adaptive=False) == (0.25, 0.75)
    assert OuterArguments(0.7, 0.9).values(is_adaptive=False) == (0.7, 0.9)


@pytest.mark.parametrize(("optimizer", "momentum"), [(torch.optim.AdamW, 0.9), (torch.optim.SGD, 0.5)])
def test_diloco_sees_what_optimizer_is_inside(
    optimizer: type[torch.optim.Optimizer], momentum: float
) -> None:
    def worker() -> float:
        model = torch.nn.Linear(4, 1)
        job = paceline.init(seed=0)
        prepared, inner = job.prepare(
            model, optimizer(model.parameters(), lr=0.01), strategy="diloco(period=1)"
        )
        prepared(torch.ones(2, 4)).sum().backward()
        inner.step()
        job.synchronize()
        found: float = job.strategy.outer.momentum
        job.close()
        return found

    assert list(simulate(worker, num_workers=2)) == [momentum] * 2


def test_a_job_tells_its_strategy_and_warns_on_one_rank() -> None:
    def worker() -> int:
        model = torch.nn.Linear(4, 1)
        data = DataLoader(TensorDataset(torch.ones(64, 4), torch.ones(64, 1)), batch_size=2)
        job = paceline.init(seed=0)
        job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.01), data, strategy="diloco")
        for _ in job.epochs(2):
            pass
        period: int = job.strategy.period
        job.close()
        return period

    with warnings.catch_warnings():
        warnings.simplefilter("error", RunLengthWarning)
        assert list(simulate(worker, num_workers=2)) == [1, 1], "2 epochs of 16 minibatches: 30 rounds"


def test_a_small_model_sends_enough_elements() -> None:
    def density(numel: int) -> float:
        def worker() -> float:
            from paceline.comm import current

            strategy = make("decentralized_threshold")
            strategy.attach(FlatModel(torch.zeros(numel)), current.provided())
            return strategy.density

        return float(simulate(worker, num_workers=1)[0])

    assert density(17_000) == 0.01 and density(200_000) == 0.005 and density(2_000_000) == 0.001


def test_warnings_are_said_before_any_training() -> None:
    said: list[str] = []

    def trained(*_: object) -> None:
        assert said == ["warning: local_sgd(period=40): " + make("local_sgd(period=40)").fit(90, 2, 16)]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(
            "digits",
            strategies=["local_sgd(period=40)"],
            epochs=2,
            virtual=VirtualCluster("constant"),
            on_note=said.append,
            on_trial=trained,
        )


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("num_workers", [2, 8, 32])
def test_every_strategy_trains_with_its_defaults(num_workers: int) -> None:
    found = compare(
        "digits",
        strategies=DISTRIBUTED,
        workers=num_workers,
        progress=False,
        virtual=VirtualCluster("constant"),
    )
    best = {trial.strategy: trial.best_accuracy for trial in found.trials}
    behind = {s: a for s, a in best.items() if a < best["all_reduce"] - 0.05}
    assert not behind, f"more than 5 points behind all_reduce's {best['all_reduce']:.3f}"
