"""The simulated fabric's closed forms against the schedule simulator, which times every transfer."""

from __future__ import annotations

from typing import Any

import pytest

from paceline.collectives import halving_doubling, recursive_doubling, ring
from paceline.comm.faults import Faults
from paceline.comm.simulated_network import Network
from paceline.errors import PacelineError
from paceline.schedule import topology
from paceline.schedule.simulate import simulate

ALGORITHMS: list[Any] = [ring, halving_doubling, recursive_doubling]


def best_s(operation: str, num_ranks: int, num_bytes: int) -> float:
    """The fastest algorithm's time on 1 Gbit/s Ethernet."""
    times = []
    for algorithm in ALGORITHMS:
        try:
            program = algorithm.build(operation, num_ranks)
        except PacelineError:  # not every algorithm knows every operation
            continue
        network = topology.parse("ethernet(gbit=1)", num_ranks=num_ranks)
        times.append(float(simulate(program, network, num_bytes).time_s))
    return min(times)


@pytest.mark.parametrize("num_bytes", [8, 40_000, 1_000_000])
@pytest.mark.parametrize(
    ("operation", "num_ranks"),
    [*(("all_reduce", p) for p in (2, 6, 8, 30, 32)), ("all_gather", 8), ("reduce_scatter", 32)],
)
def test_closed_forms_agree_with_schedules(operation: str, num_ranks: int, num_bytes: int) -> None:
    """Within 2 %: the closed forms leave out the time of the reduction itself."""
    network = Network(topology.parse("ethernet(gbit=1)", num_ranks=num_ranks), Faults())
    claimed = network.collective_s(operation, num_bytes, num_ranks)
    assert claimed == pytest.approx(best_s(operation, num_ranks, num_bytes), rel=0.02)
