"""Virtual throughput against the formulas: stragglers, and the server's bottleneck."""

from __future__ import annotations

from math import exp, gamma, lgamma
from typing import Any

import pytest
import torch
from workbench import train

from paceline.comm import current
from paceline.comm.simulation import simulate


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


@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_server_saturates_where_the_closed_queue_says(shards: int) -> None:
    workers, compute_s, numel, steps = 32, 0.05, 250_000, 16
    beta = 8e-9
    slice_s = 4 * numel / shards * beta  # one slice through one port at 1 Gbit/s
    ends: list[tuple[int, float]] = []
    train(
        f"parameter_server(shards={shards}, backup=0)",
        num_workers=workers,
        steps=steps,
        numel=numel,
        dtype=torch.float32,
        update=lambda rank, step, w: torch.zeros((), dtype=w.dtype),
        compute=f"constant(mean_s={compute_s})",
        network="ethernet(gbit=1)",
        each_step=lambda rank, step, method: ends.append((step, method.comm.now())),
        record=False,
    )
    warm = 6
    first = max(t for s, t in ends if s == warm - 1)
    last = max(t for s, t in ends if s == steps - 1)
    throughput = workers * (steps - warm) / (last - first)
    # Per round a server's port carries 31 workers' slices and its own worker's slices to the other servers;
    # a worker that meets no queue takes its compute time and all its slices out and in.
    bottleneck = workers / (slice_s * (workers - 1 + shards - 1))
    unhurried = workers / (compute_s + 2 * shards * slice_s)
    assert throughput == pytest.approx(min(bottleneck, unhurried), rel=0.05)
