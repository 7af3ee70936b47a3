"""The whole interface on CUDA tensors: every strategy ends with the CPU run's accuracy."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import gpu_bodies
import pytest
from gpu_pool import GpuPool

pytestmark = pytest.mark.gpu

# Digits has 360 test samples: 0.02 are 7 of them. What does not wait for others ends elsewhere in every run.
SYNCHRONOUS, ASYNCHRONOUS = 0.02, 0.06
STRATEGIES = {
    "all_reduce": SYNCHRONOUS,
    "all_reduce(codec=fp16)": SYNCHRONOUS,
    "all_reduce(codec=bf16)": SYNCHRONOUS,
    "all_reduce(codec=int8)": SYNCHRONOUS,
    "all_reduce(codec=error_feedback(codec=int4))": SYNCHRONOUS,
    "all_reduce(codec=error_feedback(codec=onebit))": SYNCHRONOUS,
    "all_reduce(codec=error_feedback(codec=topk(density=0.05)))": SYNCHRONOUS,
    "all_reduce(codec=threshold(density=0.05))": SYNCHRONOUS,
    "all_reduce(codec=threshold(density=0.05, entropy=true))": SYNCHRONOUS,
    "all_reduce(codec=powersgd(rank=2))": SYNCHRONOUS,
    "local_sgd(period=4)": SYNCHRONOUS,
    "local_sgd(period=4, codec=int8)": SYNCHRONOUS,
    "bmuf(period=8)": SYNCHRONOUS,
    "slowmo(period=8)": SYNCHRONOUS,
    "diloco(period=8, momentum=0.3)": SYNCHRONOUS,
    "streaming_diloco(period=8, fragments=2, momentum=0.3)": SYNCHRONOUS,
    "gossip(mode=synchronous)": ASYNCHRONOUS,
    "gossip": ASYNCHRONOUS,
    "parameter_server": ASYNCHRONOUS,
    "parameter_server(staleness=bounded(s=2), codec=int8)": ASYNCHRONOUS,
    "parameter_server(sends=gradients, lr=0.02)": ASYNCHRONOUS,
    "decentralized_threshold(tau=0.002)": ASYNCHRONOUS,
}


@functools.cache
def on_cpu(pool: GpuPool, strategy: str) -> dict[str, Any]:
    result: dict[str, Any] = pool.run(gpu_bodies.train, "cpu", strategy)[0]
    return result


def check(results: list[dict[str, Any]], reference: dict[str, Any], tolerance: float) -> None:
    assert len({r["digest"] for r in results}) == 1, "the replicas differ"
    assert all(r["devices"] == ["cuda"] and r["finite"] for r in results)
    print(f"accuracy {results[0]['accuracy']:.3f} on the GPU, {reference['accuracy']:.3f} on the CPU")
    assert abs(results[0]["accuracy"] - reference["accuracy"]) <= tolerance


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_ends_as_on_the_cpu(pool: GpuPool, strategy: str) -> None:
    results = pool.run(gpu_bodies.train, "cuda", strategy)
    assert all(r["fabric"] == "torch" for r in results)
    check(results, on_cpu(pool, strategy), STRATEGIES[strategy])


@pytest.mark.parametrize("strategy", ["all_reduce", "local_sgd(period=4)"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision(pair: GpuPool, precision: str, strategy: str) -> None:
    results = pair.run(gpu_bodies.train, "cuda", strategy, precision=precision)
    check(results, on_cpu(pair, strategy), SYNCHRONOUS)


def test_grad_scaler_in_the_loop(pair: GpuPool) -> None:
    results = pair.run(gpu_bodies.train, "cuda", "all_reduce", scaler=True)
    check(results, on_cpu(pair, "all_reduce"), SYNCHRONOUS)


def test_compiled_model(pair: GpuPool) -> None:
    results = pair.run(gpu_bodies.train, "cuda", "all_reduce", compiles=True)
    check(results, on_cpu(pair, "all_reduce"), SYNCHRONOUS)


@pytest.mark.parametrize("strategy", ["single", "all_reduce", "parameter_server"])
def test_one_rank_with_nccl(alone: GpuPool, strategy: str) -> None:
    results = alone.run(gpu_bodies.train, "cuda", strategy)
    check(results, on_cpu(alone, strategy), SYNCHRONOUS)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_evaluation(pair: GpuPool, device: str) -> None:
    results = pair.run(gpu_bodies.evaluated, device)
    assert results[0] == results[1]
    assert results[0]["undisturbed"]
    assert results[0]["accuracy"] == pytest.approx(results[0]["object"])


STATEFUL = [
    "all_reduce",
    "all_reduce(codec=error_feedback(codec=onebit))",
    "all_reduce(codec=powersgd)",
    "local_sgd(period=3, codec=threshold(density=0.1))",
    "bmuf(period=3)",
    "streaming_diloco(period=4, fragments=2)",
    "gossip(mode=synchronous)",
    "parameter_server",
    "decentralized_threshold(tau=0.01)",
]


@pytest.mark.parametrize("strategy", STATEFUL)
@pytest.mark.parametrize("where", [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")], ids=" to ".join)
def test_checkpoints_know_no_device(
    pair: GpuPool, where: tuple[str, str], strategy: str, tmp_path: Path
) -> None:
    results = pair.run(gpu_bodies.saved_and_loaded, str(tmp_path / "checkpoint"), strategy, *where)
    for r in results:
        assert r["saved"] == r["loaded"]
        gaps = [abs(a - b) for a, b in zip(r["saves"], r["loads"], strict=True)]
        assert sum(gaps) / len(gaps) < 0.01  # trained on alike
