"""What must hold for every program, network and disturbance."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline import collectives
from paceline.schedule import topologies
from paceline.schedule.program import Program
from paceline.schedule.simulation.simulate import Conditions, simulate

pytestmark = pytest.mark.property

NETWORKS = (
    "ethernet(gbit=1)",
    "cluster(hosts=4, local=2)",
    "cluster(hosts=2, local=4, rails=2)",
    "dumbbell(trunk_gbit=2)",
    "torus(rows=2, columns=4)",
    "hypercube",
    "dgx1",
    "random(seed=5)",
    "shared_memory",
)
P = 8
PAIRS = sorted(
    (name, operation)
    for name, module in collectives.algorithms().items()
    for operation in module.OPERATIONS
    if collectives.supports(name, operation, P)
)

programs = st.sampled_from(PAIRS).map(lambda pair: collectives.build(*pair, P))
networks = st.sampled_from(NETWORKS).map(lambda text: topologies.parse(text, num_ranks=P))
sizes = st.sampled_from((0, 1, 1000, 10**6, 10**9))
ranks = st.integers(0, P - 1)
factors = st.floats(1.0, 50.0)
disturbances = st.builds(
    Conditions,
    late_s=st.dictionaries(ranks, st.floats(0, 1), max_size=3),
    slowdown=st.dictionaries(ranks, factors, max_size=3),
    slow_links=st.dictionaries(st.tuples(ranks, ranks), factors, max_size=3),
)
SETTINGS = settings(max_examples=60, deadline=None)


@SETTINGS
@given(programs, networks, sizes, disturbances, ranks, ranks, factors, st.booleans())
def test_slower_is_never_faster(
    program: Program,
    net: topologies.Topology,
    size: int,
    now: Conditions,
    a: int,
    b: int,
    factor: float,
    by_chunk: bool,
) -> None:
    base = simulate(program, net, size, conditions=now, by_chunk=by_chunk)
    worse = (
        Conditions(
            now.late_s, now.slowdown, {**now.slow_links, (a, b): now.slow_links.get((a, b), 1) * factor}
        ),
        Conditions(now.late_s, {**now.slowdown, a: now.slowdown.get(a, 1) * factor}, now.slow_links),
        Conditions({**now.late_s, a: now.late_s.get(a, 0) + factor}, now.slowdown, now.slow_links),
    )
    for then in worse:
        slow = simulate(program, net, size, conditions=then, by_chunk=by_chunk)
        assert (slow.finish_s >= base.finish_s * (1 - 1e-9)).all()


@SETTINGS
@given(programs, networks, sizes, disturbances)
def test_more_bytes_take_no_less_time(
    program: Program, net: topologies.Topology, size: int, now: Conditions
) -> None:
    small = simulate(program, net, size, conditions=now)
    large = simulate(program, net, 2 * size + 1, conditions=now)
    assert large.time_s >= small.time_s * (1 - 1e-9)
    assert (large.sent_bytes >= small.sent_bytes).all()


@SETTINGS
@given(programs, sizes, st.floats(0.01, 100))
def test_only_the_product_of_bytes_and_cost_matters(program: Program, size: int, factor: float) -> None:
    def time_s(gbit: float, num_bytes: float) -> float:
        text = f"ethernet(gbit={gbit!r}, reduce_gbyte={gbit!r})"
        return simulate(program, topologies.parse(text, num_ranks=P), num_bytes).time_s

    assert np.isclose(time_s(factor, size * factor), time_s(1.0, size), rtol=1e-6)


@SETTINGS
@given(programs, networks, sizes, disturbances)
def test_the_same_again_is_the_same(
    program: Program, net: topologies.Topology, size: int, now: Conditions
) -> None:
    first, second = (simulate(program, net, size, conditions=now, record=True) for _ in range(2))
    assert np.array_equal(first.finish_s, second.finish_s)
    assert first.events is not None
    assert second.events is not None
    assert np.array_equal(first.events.end_s, second.events.end_s)


@SETTINGS
@given(programs, networks, sizes, disturbances)
def test_knowing_less_is_never_faster(
    program: Program, net: topologies.Topology, size: int, now: Conditions
) -> None:
    exact = simulate(program, net, size, conditions=now, by_chunk=True)
    coarse = simulate(program, net, size, conditions=now, by_chunk=False)
    assert (coarse.finish_s >= exact.finish_s * (1 - 1e-9)).all()
    assert np.allclose(coarse.sent_bytes, exact.sent_bytes)


@SETTINGS
@given(programs, networks, disturbances)
def test_nobody_finishes_before_a_bound_of_its_own_traffic(
    program: Program, net: topologies.Topology, now: Conditions
) -> None:
    run = simulate(program, net, 10**6, conditions=now, record=True)
    assert run.events is not None
    assert (run.events.end_s >= run.events.start_s).all()
    assert run.time_s >= max(now.late_s.values(), default=0.0)
    sent = np.bincount(run.events.src_rank, weights=run.events.num_bytes, minlength=P)
    assert np.allclose(sent, run.sent_bytes)
