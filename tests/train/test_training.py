"""Synchronous and averaging strategies against one machine, and against each other."""

from __future__ import annotations

from typing import Any

import bodies
import pytest
from rank_pool import RankPool

pytestmark = pytest.mark.xdist_group("processes")


def close(a: list[float], b: list[float], tolerance: float = 1e-9) -> bool:
    return len(a) == len(b) and all(abs(x - y) <= tolerance * (1 + abs(y)) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("strategy", "settings"),
    [
        ("all_reduce", {"count": 53}),  # the last round has 5 samples: 2, 2 and 1 of them on the ranks
        ("all_reduce(bucket_mib=0.0001)", {"count": 53, "momentum": 0.9}),
        ("all_reduce", {"count": 48, "clip": 0.1}),
        ("all_reduce", {"count": 48, "set_to_none": False}),
        ("all_reduce", {"count": 48, "accumulation_steps": 2}),
        ("all_reduce", {"count": 60, "accumulation_steps": 2}),  # the epoch ends inside a window
        ("local_sgd(period=1)", {"count": 48}),
        ("local_sgd(period=1, average_optimizer=true)", {"count": 48, "momentum": 0.9}),
    ],
)
def test_equals_one_machine_on_the_union_batch(
    three: RankPool, strategy: str, settings: dict[str, Any]
) -> None:
    results = three.run(bodies.against_one_machine, strategy, **settings)
    for result in results:
        assert close(result["ours"], result["one"])
        assert close(result["norms"], result["one_norms"])  # clipping saw the complete gradients
    assert len({r["digest"] for r in results}) == 1


def test_local_sgd_with_a_longer_period_is_not_the_same(three: RankPool) -> None:
    result = three.run(bodies.against_one_machine, "local_sgd(period=4)", count=48)[0]
    assert not close(result["ours"], result["one"], 1e-6)


def test_accumulation_sends_once(three: RankPool) -> None:
    once = three.run(bodies.against_one_machine, "all_reduce", count=48)[0]["stats"]
    every_second = three.run(bodies.against_one_machine, "all_reduce", count=48, accumulation_steps=2)[0][
        "stats"
    ]
    assert every_second["training"]["payload_bytes"] * 2 == once["training"]["payload_bytes"] > 0


@pytest.mark.parametrize(
    "strategy", ["all_reduce", "local_sgd(period=3)", "local_sgd(period=3, average_optimizer=true)"]
)
def test_final_models_are_identical_bit_for_bit(three: RankPool, strategy: str) -> None:
    assert len(set(three.run(bodies.batchnorm_replica, strategy))) == 1


@pytest.mark.parametrize(
    "strategy",
    [
        "all_reduce",
        "all_reduce(bucket_mib=0.001)",
        "local_sgd(period=5)",
        "local_sgd(period=5, average_optimizer=true)",
    ],
)
def test_traffic_claims_hold(three: RankPool, strategy: str) -> None:
    for result in three.run(bodies.sends, strategy, 20):
        sent, claim = result["stats"]["training"]["payload_bytes"], result["claim"]
        assert claim <= sent <= claim * 1.02 + 5 * 24 + 256, (claim, sent)
        assert result["stats"]["wire_bytes"] is None


def test_one_worker_sends_nothing(three: RankPool) -> None:
    for strategy in ("single", "all_reduce", "local_sgd(period=2)"):
        assert three.run(bodies.sends, strategy, 4, ranks=1)[0]["stats"]["training"]["payload_bytes"] == 0


def test_unused_frozen_and_tied_parameters(three: RankPool) -> None:
    results = three.run(bodies.unused_on_some_ranks)
    for result in results:
        assert result["everywhere"] == [[1.0, 1.0, 1.0]]
        assert close(result["somewhere"][0], [1 / 3] * 3, 1e-6)
        assert result["nowhere"] is None
        assert result["frozen"] is None
        assert result["buckets"] > 2
        assert "everywhere.weight" in result["keys"]
    assert len({r["digest"] for r in results}) == 1


def test_overflow_on_one_rank_is_skipped_on_all(three: RankPool) -> None:
    results = three.run(bodies.overflow_on_one_rank, "all_reduce")
    assert {tuple(r["scales"]) for r in results} == {(8.0, 4.0, 4.0, 4.0)}
    assert results[0]["weights"][0] == results[0]["weights"][1] != results[0]["weights"][2]
    assert len({r["final"] for r in results}) == 1
    assert all(r["finite"] for r in results)


def test_overflow_on_one_rank_keeps_local_sgd_in_step(three: RankPool) -> None:
    results = three.run(bodies.overflow_on_one_rank, "local_sgd(period=2)")
    assert [r["scales"][1] for r in results] == [8.0, 4.0, 8.0]
    assert len({r["final"] for r in results}) == 1
    assert all(r["finite"] for r in results)


def test_no_sync_sends_the_sum(three: RankPool) -> None:
    results = three.run(bodies.no_sync)
    assert [r["local"][0][0] for r in results] == [1.0, 2.0, 3.0]
    assert all(close(r["final"][0], [4.0] * 3, 1e-6) and r["calls"] == 1 for r in results)


def test_undeclared_accumulation_is_still_right(three: RankPool) -> None:
    assert all(close(r, [6.0] * 3, 1e-6) for r in three.run(bodies.undeclared_backwards))


def test_odd_parameters(three: RankPool) -> None:
    results = three.run(bodies.odd_parameters)
    assert len({r["digest"] for r in results}) == 1
    assert all(r["layouts"] == [True] * 3 and r["minibatches"] == 3 for r in results)


@pytest.mark.slow
def test_compiled_models_train_alike(three: RankPool) -> None:
    results = three.run(bodies.compiled, ranks=2)
    assert all(compiled == eager and plain for compiled, eager, plain in results)
    assert len({compiled for compiled, *_ in results}) == 1


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("sparse", "ConfigError: module Embedding makes sparse gradients"),
        ("single", "ConfigError: strategy 'single' trains on 1 worker, this job has 3"),
        ("name", "Did you mean 'all_reduce'?"),
        ("argument", "It takes: period=(chosen), average_optimizer=false"),
        ("period", "ConfigError: local_sgd: period=0"),
        ("different", "Mismatch: rank"),
        ("stranger", "ConfigError: SGD holds 2 parameters that are not in the model"),
        ("late", "job.prepare(model, optimizer, ...) again"),
        ("no samples", "ConfigError: the data set has no samples"),
    ],
)
def test_wrong_use_is_a_clear_error(three: RankPool, what: str, message: str) -> None:
    for text in three.run(bodies.error_of, what):
        assert message in text, text
