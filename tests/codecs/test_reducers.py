"""Sums with codecs on the simulated fabric: close to exact, equal bits on all ranks, claimed bytes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from paceline import codecs
from paceline.codecs.reducers.reducer import finish, split_evenly
from paceline.comm import current
from paceline.comm.simulated.simulate import simulate
from paceline.errors import ConfigError

SPECS = {
    "fp16": 1e-3,
    "bf16": 1e-2,
    "int8": 2e-2,
    "int4": 0.3,
    "int8(stochastic=true)": 3e-2,
    "error_feedback(codec=onebit)": None,
    "error_feedback(codec=int4)": 0.3,
    "threshold(density=0.02)": None,
    "error_feedback(codec=topk(density=0.1))": None,
    "topk(density=1.0)": 1e-6,
    "powersgd(rank=2)": None,
    "powersgd(rank=40)": 1e-6,
}
LAYOUT = [(0, (60, 50)), (3000, (50,)), (3072, (20, 10, 3, 3)), (4880, (120,))]
NUMEL = 5000


def on_ranks(size: int, body: Callable[[Any], Any]) -> list[Any]:
    return list(simulate(lambda: body(current.provided()), num_workers=size))


def gradients(rank: int, step: int) -> torch.Tensor:
    x = torch.randn(NUMEL, generator=torch.Generator().manual_seed(1000 * step + rank))
    x[3050:3072] = x[4872:4880] = 0  # between tensors
    return x


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("spec", SPECS)
def test_sum(spec: str, size: int) -> None:
    def body(comm: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        state: dict[str, Any] = {}
        flat = gradients(comm.rank, 0)
        codecs.make_reducer(spec).reduce(flat, LAYOUT, comm, state)
        return flat, state

    results = on_ranks(size, body)
    exact = sum(gradients(r, 0) for r in range(size))
    for flat, _ in results:
        assert torch.equal(flat, results[0][0])
    error = SPECS[spec]
    if error is not None or size == 1:
        assert (results[0][0] - exact).abs().max() <= (error or 0) * exact.abs().max() * size


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    "spec",
    [
        "error_feedback(codec=onebit)",
        "error_feedback(codec=int8)",
        "error_feedback(codec=topk(density=0.1))",
        "threshold(tau=0.5)",
        "powersgd(rank=1)",
    ],
)
def test_what_was_not_sent_is_kept(spec: str, size: int) -> None:
    """Σ over steps of the results + all residuals = Σ of all gradients."""
    steps = 20

    def body(comm: Any) -> tuple[torch.Tensor, torch.Tensor]:
        state: dict[str, Any] = {}
        reducer = codecs.make_reducer(spec)
        total = torch.zeros(NUMEL)
        for step in range(steps):
            if step == 9:
                reducer, state = codecs.make_reducer(spec), copy.deepcopy(state)
            flat = gradients(comm.rank, step)
            reducer.reduce(flat, LAYOUT, comm, state)
            total += flat
        left = torch.zeros(NUMEL)
        if "worker" in state:
            left += torch.cat([s["residual"] for s in state["worker"]])
            start, end = split_evenly(NUMEL, size)[comm.rank]
            left[start:end] += state["server"]["residual"]
        else:
            left += state["residual"]
        return total, left

    results = on_ranks(size, body)
    kept = sum(left for _, left in results)
    exact = sum(gradients(r, s) for r in range(size) for s in range(steps))
    assert torch.equal(results[0][0], results[-1][0])
    assert torch.allclose(results[0][0] + kept, exact, atol=2e-4)


def test_error_feedback_makes_the_mean_right_in_the_long_run() -> None:
    def body(comm: Any, spec: str) -> torch.Tensor:
        state: dict[str, Any] = {}
        reducer = codecs.make_reducer(spec)
        total = torch.zeros(NUMEL)
        for _ in range(200):
            flat = gradients(comm.rank, 0)
            reducer.reduce(flat, LAYOUT, comm, state)
            total += flat / 200
        return total

    exact = gradients(0, 0) + gradients(1, 0)
    for spec in ["error_feedback(codec=onebit)", "powersgd(rank=2)", "threshold(tau=4.0)"]:
        result = on_ranks(2, lambda comm, spec=spec: body(comm, spec))[0]
        assert (result - exact).abs().mean() < 0.1 * exact.abs().mean(), spec


def test_dense_bytes_do_not_grow_with_the_number_of_ranks() -> None:
    def body(comm: Any) -> int:
        flat = torch.randn(100_000)
        codecs.make_reducer("int8").reduce(flat, [], comm, {})
        return int(comm.ledger.snapshot()["payload_bytes"])

    for size in (2, 4, 8):
        handed = max(on_ranks(size, body))
        assert handed <= 1.02 * 100_000 * (1 + 1 / size) + 4096 + 64 * size


def test_powersgd_bytes() -> None:
    def body(comm: Any) -> tuple[int, dict[str, float]]:
        state: dict[str, Any] = {}
        reducer = codecs.make_reducer("powersgd(rank=2)")
        reducer.reduce(gradients(comm.rank, 0), LAYOUT, comm, state)
        return int(comm.ledger.snapshot()["payload_bytes"]), reducer.stats(state)

    handed, stats = on_ranks(2, body)[0]
    uncompressed = NUMEL - 60 * 50 - 20 * 90
    assert handed == 4 * (2 * (60 + 50) + 2 * (20 + 90) + uncompressed)
    assert stats["encoded_bytes"] == handed
    assert stats["raw_bytes"] == 4 * NUMEL


def test_many_buckets_in_flight() -> None:
    def body(comm: Any) -> list[torch.Tensor]:
        reducer = codecs.make_reducer("error_feedback(codec=int8)")
        states: list[dict[str, Any]] = [{} for _ in range(4)]
        flats = [gradients(comm.rank, i) for i in range(4)]
        finish([reducer.start(f, LAYOUT, comm, s) for f, s in zip(flats, states, strict=True)])
        return flats

    a, b = on_ranks(2, body)
    for i in range(4):
        assert torch.equal(a[i], b[i])
        exact = gradients(0, i) + gradients(1, i)
        assert (a[i] - exact).abs().max() < 0.2


def test_a_changed_number_of_ranks_keeps_the_workers_residual() -> None:
    saved: dict[str, Any] = {}
    numel = 20_000

    def first(comm: Any) -> None:
        state: dict[str, Any] = {}
        codecs.make_reducer("error_feedback(codec=int4)").reduce(torch.randn(numel), [], comm, state)
        if comm.rank == 0:
            saved.update(state)

    on_ranks(4, first)
    before = torch.cat([one["residual"] for one in saved["worker"]])

    def second(comm: Any) -> torch.Tensor | None:
        state = copy.deepcopy(saved) if comm.rank == 0 else {}
        flat = torch.zeros(numel)
        codecs.make_reducer("error_feedback(codec=fp16)").reduce(flat, [], comm, state)
        return flat

    assert torch.allclose(on_ranks(2, second)[0], before, atol=2e-3)


@pytest.mark.parametrize("spec", ["error_feedback(codec=onebit)", "int4", "powersgd(rank=1)"])
def test_noise_between_tensors_does_not_come_back(spec: str) -> None:
    def body(comm: Any) -> float:
        state: dict[str, Any] = {}
        reducer = codecs.make_reducer(spec)
        flat = gradients(comm.rank, 0)
        for step in range(60):
            for offset, shape in LAYOUT:  # new gradients, the padding left as it is
                numel = torch.Size(shape).numel()
                flat[offset : offset + numel] = gradients(comm.rank, step)[offset : offset + numel]
            reducer.reduce(flat, LAYOUT, comm, state)
        return flat.abs().max().item()

    assert max(on_ranks(3, body)) < 100


def test_bad_input() -> None:
    reducer = codecs.make_reducer("int8")

    def body(comm: Any) -> None:
        for bad in (torch.zeros(4, 4), torch.zeros(8, dtype=torch.float64), torch.zeros(8, 2)[:, 0]):
            with pytest.raises(ConfigError, match="1-D contiguous float32"):
                reducer.start(bad, [], comm, {})
        with pytest.raises(ConfigError, match="overlaps"):
            codecs.make_reducer("powersgd").start(torch.zeros(100), [(90, (50, 50))], comm, {})

    on_ranks(2, body)
    with pytest.raises(ConfigError, match="rank=0: a whole number >= 1"):
        codecs.make_reducer("powersgd(rank=0)")


@pytest.mark.parametrize("spec", SPECS)
def test_tensors_without_elements_change_nothing(spec: str) -> None:
    """They have the offset of a neighbour, wherever they are in the layout."""
    empty = [(0, (0,)), (3000, (60, 0)), (3072, (0, 3)), (4880, (999, 0)), (5000, (0,))]

    def body(comm: Any, layout: list[tuple[int, tuple[int, ...]]]) -> torch.Tensor:
        flat = gradients(comm.rank, 0)
        codecs.make_reducer(spec).reduce(flat, layout, comm, {})
        nothing = torch.zeros(0)
        codecs.make_reducer(spec).reduce(nothing, [(0, (0,))], comm, {})
        return flat

    plain = on_ranks(3, lambda comm: body(comm, LAYOUT))
    mixed = on_ranks(3, lambda comm: body(comm, sorted([*LAYOUT, *empty])))
    assert torch.equal(plain[0], mixed[0])
