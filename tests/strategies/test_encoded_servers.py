"""parameter_server(codec=…) and streaming_diloco(codec=…): encoded both ways, and still what was promised."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from workbench import continued_and_resumed, train

from paceline.errors import ConfigError
from paceline.strategies.base.strategy import make

pytestmark = pytest.mark.contract

ENCODED = [
    "parameter_server(codec=error_feedback(codec=int8))",
    "parameter_server(codec=threshold(density=0.1), shards=2, staleness=softsync(c=2)+inverse)",
    "parameter_server(codec=fp16, shards=3, push=2, prefetch=true)",
    "streaming_diloco(period=4, fragments=2, codec=error_feedback(codec=int8))",
]
NOISY: dict[str, Any] = {"compute": "pareto(shape=2)", "dtype": torch.float32}


@pytest.mark.parametrize("strategy", ENCODED)
def test_replicas_end_equal_and_runs_repeat(strategy: str) -> None:
    first, second = (train(strategy, num_workers=5, steps=30, numel=600, seed=2, **NOISY) for _ in range(2))
    assert all(torch.equal(result[0], first[0][0]) for result in [*first, *second])
    assert first.log.digest() == second.log.digest()


@pytest.mark.parametrize("strategy", ENCODED)
def test_traffic_claim_equals_the_ledger(strategy: str) -> None:
    steps, workers, numel = 120, 6, 4000
    run = train(strategy, num_workers=workers, steps=steps, numel=numel, after=claim, **NOISY)
    sent = sum(result[1]["payload_bytes"] for result in run) / workers / steps
    claimed = sum(result[2] for result in run) / workers
    assert claimed == pytest.approx(sent, rel=0.08)


def claim(rank: int, method: Any) -> float:
    return float(method.traffic(4000 * 4, 6))


def toward_one(rank: int, step: int, weights: torch.Tensor) -> torch.Tensor:
    return 0.05 * (1 - weights)


@pytest.mark.parametrize("codec", ["int8", "error_feedback(codec=onebit)", "threshold(tau=0.1)", "fp16"])
def test_what_an_answer_leaves_out_comes_with_the_next(codec: str) -> None:
    """Workers would not reach the target if the rest of W − known were forgotten, or counted twice."""
    seen: dict[int, torch.Tensor] = {}

    def look(rank: int, step: int, method: Any) -> None:
        seen[rank] = method.replica.parameters[0].clone()

    spec = f"parameter_server(codec={codec}, staleness=softsync(c=3))"
    train(spec, num_workers=3, steps=250, numel=64, update=toward_one, each_step=look, **NOISY)
    assert all((pulled - 1).abs().max() < 0.25 for pulled in seen.values())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("strategy", ENCODED[:3])
def test_others_go_on_when_a_worker_is_killed(strategy: str, seed: int) -> None:
    faults = f"kill(rank={seed}, at_s={0.05 + 0.03 * seed})"
    run = train(strategy, num_workers=6, steps=15, numel=64, seed=seed, faults=faults, **NOISY)
    living = [r for i, r in enumerate(run.results) if i not in run.killed]
    assert run.killed == [seed] and all(torch.equal(r[0], living[0][0]) for r in living)


@pytest.mark.parametrize("strategy", ENCODED)
def test_save_and_continue_equals_save_exit_resume(strategy: str) -> None:
    through, resumed = continued_and_resumed(strategy, torch.linspace(-1, 1, 100))
    assert torch.equal(through[0], resumed[0])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="float32"):
        train("parameter_server(codec=int8)", num_workers=2, steps=1, dtype=torch.float64)
    with pytest.raises(ConfigError, match="powersgd"):
        make("parameter_server(codec=powersgd(rank=1))")
    with pytest.raises(ConfigError, match="only one"):
        make("streaming_diloco(codec=int8, payload=bfloat16)")
