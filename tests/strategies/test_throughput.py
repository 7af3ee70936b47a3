"""Virtual throughput against the formulas: stragglers, and the server's bottleneck."""

from __future__ import annotations

from math import exp, gamma, lgamma
from typing import Any

import pytest
import torch
from workbench import train

from paceline.comm import current
from paceline.comm.simulated.network import HEADER_BYTES
from paceline.comm.simulated.simulate import simulate

pytestmark = pytest.mark.contract


def expected_slowest(num_workers: int, shape: float, minimum_s: float) -> float:
    """E[max of P] of Pareto(shape, minimum): xΓ(P+1)Γ(1−1/a)/Γ(P+1−1/a)."""
    p, a = num_workers, shape
    return minimum_s * exp(lgamma(p + 1) - lgamma(p + 1 - 1 / a)) * gamma(1 - 1 / a)


@pytest.mark.parametrize("num_workers", [2, 8, 24])
def test_synchronous_steps_take_as_long_as_the_slowest(num_workers: int) -> None:
    def body() -> float:
        comm: Any = current.provided()
        for _ in range(2500):
            comm.charge_compute()
            comm.barrier().wait()
        return float(comm.now()) / 2500

    run = simulate(
        body,
        num_workers=num_workers,
        compute="pareto(shape=3, minimum_s=0.01)",
        network="ethernet(gbit=100, latency_us=0)",
        record=False,
        seed=2,
    )
    assert run[0] == pytest.approx(expected_slowest(num_workers, 3, 0.01), rel=0.05)


@pytest.mark.parametrize("num_workers", [2, 8, 24])
def test_asynchronous_steps_take_their_own_mean(num_workers: int) -> None:
    run = train(
        "parameter_server(shards=1, backup=0)",
        num_workers=num_workers,
        steps=2400 // num_workers,
        compute="pareto(shape=3, minimum_s=0.01)",
        update=lambda rank, step, w: torch.zeros_like(w),
        record=False,
    )
    computing = sum(r[1]["wait_s"] for r in run) / num_workers
    assert computing < 0.25 * run.seconds  # only the wait for the last worker's end


def closed_queue(num_workers: int, think_s: float, demand_s: float) -> float:
    """Mean-value analysis of one station: customers per second."""
    throughput = queue = 0.0
    for n in range(1, num_workers + 1):
        response_s = demand_s * (1 + queue)
        throughput = n / (think_s + response_s)
        queue = throughput * response_s
    return throughput


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("num_workers", "compute_s", "numel", "gbit"),
    [(32, 0.05, 25_000, 0.1), (16, 0.03, 20_000, 0.1), (24, 0.08, 50_000, 0.2)],
)
def test_servers_are_the_closed_queue(
    num_workers: int, compute_s: float, numel: int, gbit: float, shards: int
) -> None:
    """In docs/asynchronous.md: what a server's port serves, and what a minibatch takes beside it."""
    steps, warm = 120, 30
    ends: list[list[float]] = [[] for _ in range(num_workers)]
    train(
        f"parameter_server(shards={shards}, backup=0)",
        num_workers=num_workers,
        steps=steps,
        numel=numel,
        dtype=torch.float32,
        update=lambda rank, step, w: torch.zeros((), dtype=w.dtype),
        compute=f"exponential(mean_s={compute_s})",
        network=f"ethernet(gbit={gbit})",
        each_step=lambda rank, step, method: ends[rank].append(method.comm.now()),
        record=False,
    )
    slice_s = (4 * numel / shards + HEADER_BYTES) * 8e-9 / gbit
    demand_s = slice_s * (num_workers + shards - 2) / num_workers
    expected = closed_queue(num_workers, compute_s + shards * slice_s + 2 * 50e-6, demand_s)
    hosts = {j * num_workers // shards for j in range(shards)}
    spent_s = [e[-1] - e[warm - 1] for r, e in enumerate(ends) if r not in hosts]
    throughput = num_workers * (steps - warm) * len(spent_s) / sum(spent_s)
    assert throughput == pytest.approx(expected, rel=0.05)
