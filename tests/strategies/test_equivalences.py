"""Equivalences between methods, each on made-up quadratic losses in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from workbench import quadratic, train

from paceline.strategies.outer.optimizer import OuterSGD

pytestmark = pytest.mark.contract


def final(strategy: str, *, num_workers: int = 4, steps: int = 12, **options: Any) -> torch.Tensor:
    run = train(strategy, num_workers=num_workers, steps=steps, **options)
    assert all(torch.equal(result[0], run[0][0]) for result in run), "replicas differ at the end"
    weights: torch.Tensor = run[0][0]
    return weights


def synchronous_sgd(num_workers: int, steps: int) -> torch.Tensor:
    weights = torch.linspace(-1, 1, 10, dtype=torch.float64)
    for step in range(steps):
        weights = weights + sum(quadratic(r, step, weights) for r in range(num_workers)) / num_workers
    return weights


def test_averaging_every_step_is_synchronous_sgd() -> None:
    torch.testing.assert_close(final("local_sgd(period=1)"), synchronous_sgd(4, 12))


def test_ssp_with_s_0_and_rate_1_over_n_is_bulk_synchronous() -> None:
    got = final("parameter_server(shards=3, staleness=bounded(s=0), rate=0.25)", compute="pareto(shape=2)")
    torch.testing.assert_close(got, synchronous_sgd(4, 12), rtol=1e-12, atol=1e-12)


def test_backup_with_k_equal_n_is_bulk_synchronous() -> None:
    got = final("parameter_server(shards=2, staleness=backup(k=4))", compute="exponential")
    torch.testing.assert_close(got, synchronous_sgd(4, 12), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("period", [1, 3, 5])
def test_synchronous_updates_with_rate_1_over_n_are_parameter_averaging(period: int) -> None:
    # 12 steps: the last round of period 5 is short on all workers alike
    server = f"parameter_server(staleness=bounded(s=0), rate=0.25, push={period}, pull={period})"
    torch.testing.assert_close(
        final(server, compute="exponential"), final(f"local_sgd(period={period})"), rtol=1e-12, atol=1e-12
    )


def test_softsync_1_with_constant_is_downpour_bit_for_bit() -> None:
    options = {"compute": "pareto(shape=2)", "seed": 5}
    a = train("parameter_server(staleness=softsync(c=1)+constant)", num_workers=5, steps=30, **options)
    b = train("parameter_server(staleness=constant)", num_workers=5, steps=30, **options)
    assert torch.equal(a[0][0], b[0][0]) and a.log.digest() == b.log.digest()


@pytest.mark.parametrize("period", [1, 4])
def test_cbm_without_momentum_is_averaging(period: int) -> None:
    got = final(f"bmuf(period={period}, momentum=0, rate=1, nesterov=false)")
    torch.testing.assert_close(got, final(f"local_sgd(period={period})"), rtol=1e-12, atol=1e-12)


def test_slowmo_is_cbm() -> None:
    got = final("slowmo(period=3, momentum=0.6, rate=0.8)")
    assert torch.equal(got, final("bmuf(period=3, momentum=0.6, rate=0.8, nesterov=false)"))


def test_nbm_and_diloco_have_the_same_start_points_and_differ_by_the_look_ahead() -> None:
    def state(rank: int, method: Any) -> Any:
        return method.outer.start[0].clone(), method.outer.buffer[0].clone()

    a = train("bmuf(period=3, momentum=0.9, rate=0.7)", num_workers=4, steps=12, after=state)
    b = train("diloco(period=3, momentum=0.9, rate=0.7)", num_workers=4, steps=12, after=state)
    assert torch.equal(a[0][2][0], b[0][2][0])
    torch.testing.assert_close(a[0][0] - b[0][0], 0.7 * 0.9 * b[0][2][1])


def test_streaming_diloco_with_one_fragment_and_no_delay_is_diloco() -> None:
    seen: list[torch.Tensor] = []

    def keep(rank: int, step: int, method: Any) -> None:
        if rank == 0:
            seen.append(method.consensus()[0])

    train("streaming_diloco(period=3, fragments=1, delay=0)", num_workers=4, steps=12, each_step=keep)
    torch.testing.assert_close(seen[-1], final("diloco(period=3)"), rtol=1e-12, atol=1e-12)


def test_streaming_diloco_mixes_local_and_global_on_the_right_side() -> None:
    seen: dict[int, torch.Tensor] = {}

    def keep(rank: int, step: int, method: Any) -> None:
        if rank == 0 and step == 2:
            seen[0] = method.replica.parameters[0].clone()
            seen[1] = method.consensus()[0]

    train(
        "streaming_diloco(period=3, fragments=1, delay=0, mix=0.25)", num_workers=2, steps=3, each_step=keep
    )
    local = torch.linspace(-1, 1, 10, dtype=torch.float64)
    for step in range(3):
        local = local + quadratic(0, step, local)
    torch.testing.assert_close(seen[0], 0.25 * local + 0.75 * seen[1])


@pytest.mark.parametrize("nesterov", [False, True])
def test_outer_step_is_torch_sgd_on_the_pseudo_gradient(nesterov: bool) -> None:
    start = torch.linspace(0, 1, 7, dtype=torch.float64)
    outer = OuterSGD([start], rate=0.7, momentum=0.9, nesterov=nesterov)
    parameter = torch.nn.Parameter(start.clone())
    reference = torch.optim.SGD([parameter], lr=0.7, momentum=0.9, nesterov=nesterov)
    for step in range(5):
        mean = outer.start[0] + torch.sin(torch.arange(7.0, dtype=torch.float64) + step)
        parameter.grad = parameter.detach() - mean
        outer.step([mean])
        reference.step()
        torch.testing.assert_close(outer.start[0], parameter.detach())


@pytest.mark.parametrize("mode", ["synchronous", "asynchronous"])
def test_gossip_keeps_the_sum_and_converges_to_consensus(mode: str) -> None:
    distances: list[float] = []

    def only_first_step(rank: int, step: int, weights: torch.Tensor) -> torch.Tensor:
        return torch.full_like(weights, float(rank)) if step == 0 else torch.zeros_like(weights)

    def spread(rank: int, step: int, method: Any) -> None:
        if step in (0, 39):
            method.consensus()
            distances.append(method.stats()["consensus_distance"])

    run = train(f"gossip(mode={mode})", num_workers=7, steps=40, update=only_first_step, each_step=spread)
    torch.testing.assert_close(run[0][0], torch.linspace(-1, 1, 10, dtype=torch.float64) + 3.0)
    assert distances[-1] < 1e-3 * distances[0]
