"""Collectives of the simulated fabric cost what the schedule simulator says, which counts every transfer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from paceline import collectives
from paceline.comm import current
from paceline.comm.simulated import collective_costs
from paceline.comm.simulated.collective_costs import EXACT_SIZES, CollectiveCosts
from paceline.comm.simulated.simulate import simulate
from paceline.errors import ConfigError
from paceline.schedule import topologies
from paceline.schedule.simulation.simulate import simulate as simulate_schedule

pytestmark = pytest.mark.contract

Call = Any
CALLS: dict[str, Call] = {
    "all_reduce": lambda comm, n: comm.all_reduce(torch.zeros(n)),
    "reduce": lambda comm, n: comm.reduce(torch.zeros(n)),
    "broadcast": lambda comm, n: comm.broadcast(torch.zeros(n)),
    "all_gather": lambda comm, n: comm.all_gather(torch.zeros(n), torch.zeros(n // comm.size)),
    "reduce_scatter": lambda comm, n: comm.reduce_scatter(torch.zeros(n // comm.size), torch.zeros(n)),
    "all_to_all": lambda comm, n: comm.all_to_all(torch.zeros(n), torch.zeros(n)),
    "barrier": lambda comm, n: comm.barrier(),
}


def scheduled_s(operation: str, num_ranks: int, num_bytes: int, network: str, name: str = "") -> float:
    """The fastest algorithm's time, each simulated at exactly this size."""
    made = topologies.parse(network, num_ranks=num_ranks)
    times = []
    for algorithm in [name] if name else collectives.names():
        options: dict[str, Any] = {"hosts": made.hosts} if "hierarchical" in algorithm else {}
        is_meant = operation in collectives.find(algorithm).OPERATIONS
        if is_meant and collectives.supports(algorithm, operation, num_ranks):
            program = collectives.build(algorithm, operation, num_ranks, **options)
            times.append(float(simulate_schedule(program, made, num_bytes).time_s))
    return min(times)


def charged_s(operation: str, num_ranks: int, numel: int, network: str, algorithm: str = "") -> float:
    def body() -> float:
        comm: Any = current.provided()
        if algorithm:
            with comm.using(algorithm):
                CALLS[operation](comm, numel).wait()
        else:
            CALLS[operation](comm, numel).wait()
        return float(comm.now())

    return float(simulate(body, num_workers=num_ranks, network=network)[0])


@pytest.mark.parametrize("numel", [8, 250_000])
@pytest.mark.parametrize("num_ranks", [2, 6, pytest.param(30, marks=pytest.mark.slow)])
@pytest.mark.parametrize("operation", CALLS)
def test_collectives_cost_what_the_fastest_schedule_takes(operation: str, num_ranks: int, numel: int) -> None:
    numel -= numel % num_ranks
    expected = scheduled_s(operation, num_ranks, 4 * numel, "ethernet(gbit=1)")
    assert charged_s(operation, num_ranks, numel, "ethernet(gbit=1)") == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "network", ["ethernet(gbit=10)", "dumbbell(gbit=1, trunk_gbit=2)", "torus", "random"]
)
@pytest.mark.parametrize("algorithm", ["ring", "reduction_tree", "halving_doubling"])
def test_a_named_algorithm_costs_its_own_schedule(algorithm: str, network: str) -> None:
    expected = scheduled_s("all_reduce", 16, 400_000, network, algorithm)
    assert charged_s("all_reduce", 16, 100_000, network, algorithm) == pytest.approx(expected, rel=1e-9)


def test_ranks_of_one_host_and_groups_pay_for_their_own_links_only() -> None:
    """Two hosts of four: a group within one host never touches the slow network."""

    def body() -> tuple[float, float]:
        comm: Any = current.provided()
        group = comm.split([0, 1, 2, 3])
        begin, within = comm.now(), 0.0
        if group is not None:
            group.all_reduce(torch.zeros(100_000)).wait()
            within = comm.now() - begin
        comm.barrier().wait()
        begin = comm.now()
        comm.all_reduce(torch.zeros(100_000)).wait()
        return within, comm.now() - begin

    within, between = simulate(body, num_workers=8, network="cluster(hosts=2, local=4, gbit=1)")[0]
    alone = scheduled_s("all_reduce", 4, 400_000, "cluster(hosts=1, local=4, gbit=1)")
    assert within == pytest.approx(alone, rel=0.01)
    assert between > 20 * within


def test_ever_changing_sizes_need_few_simulations(monkeypatch: pytest.MonkeyPatch) -> None:
    simulations: list[int] = []

    def counted(program: Any, network: Any, num_bytes: int) -> Any:
        simulations.append(num_bytes)
        return simulate_schedule(program, network, num_bytes)

    monkeypatch.setattr(collective_costs, "simulate", counted)
    costs = CollectiveCosts(topologies.parse("ethernet(gbit=1)", num_ranks=6), range(6))
    times = [costs.seconds("all_reduce", 1000 * n) for n in range(1, 1001)]
    assert times == sorted(times) and len(simulations) < EXACT_SIZES + 6 * len(collectives.names())
    assert times[-1] == pytest.approx(scheduled_s("all_reduce", 6, 1_000_000, "ethernet(gbit=1)"), rel=1e-6)


def test_tree_all_reduce_is_the_textbook_formula() -> None:
    """Reduction tree on one port: 2·lg P·(α + Sβ) + lg P·Sγ."""
    p, size, alpha, beta, gamma = 32, 1_000_000, 50e-6, 8e-9, 1e-10
    costs = CollectiveCosts(topologies.parse("ethernet(gbit=1)", num_ranks=p), range(p))
    expected = 2 * 5 * (alpha + size * beta) + 5 * size * gamma
    assert costs.seconds("all_reduce", size, "reduction_tree") == pytest.approx(expected, rel=0.001)


def test_an_algorithm_that_cannot_or_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"halving_doubling cannot do broadcast among 4 ranks"):
        charged_s("broadcast", 4, 8, "ethernet", "halving_doubling")
    with pytest.raises(ConfigError, match="pigeons"):
        charged_s("all_reduce", 4, 8, "ethernet", "pigeons")
