"""Simulated time: closed forms, pipelines, contention, stragglers, large P."""

from __future__ import annotations

import numpy as np
import pytest
from one_message import message_s

from paceline import collectives
from paceline.errors import ConfigError
from paceline.schedule import topologies
from paceline.schedule.builder import Builder
from paceline.schedule.program import INPUT, OUTPUT, Program
from paceline.schedule.simulation.simulate import Conditions, simulate

S = 1e7


def hand_made(p: int, steps: list[list[tuple[int, int]]], *, chunks: int = 1) -> Program:
    """Copies of OUTPUT chunk 0 between ranks, step by step."""
    b = Builder("hand_made", "broadcast", num_ranks=p, num_chunks=chunks)
    for step in steps:
        for src, dst in step:
            b.copy((src, OUTPUT, 0), (dst, OUTPUT, 0))
        b.step()
    return b.build()


def ethernet(p: int) -> topologies.Topology:
    return topologies.parse("ethernet(gbit=8, latency_us=100, reduce_gbyte=5)", num_ranks=p)


def test_one_message() -> None:
    run = simulate(hand_made(2, [[(0, 1)]]), ethernet(2), S, record=True)
    assert run.time_s == pytest.approx(1e-4 + S * 1e-9)
    assert run.steps == 1
    assert run.sent_bytes.tolist() == [S, 0]
    assert run.events is not None
    assert run.events.end_s.tolist() == [pytest.approx(run.time_s)]


def test_sends_of_one_step_share_the_port_and_the_latency() -> None:
    run = simulate(hand_made(4, [[(0, 1), (0, 2), (0, 3)]]), ethernet(4), S)
    assert run.time_s == pytest.approx(1e-4 + 3 * S * 1e-9)


def test_incast_shares_the_receiver() -> None:
    run = simulate(hand_made(4, [[(1, 0), (2, 0), (3, 0)]]), ethernet(4), S)
    assert run.time_s == pytest.approx(1e-4 + 3 * S * 1e-9)


def test_full_duplex() -> None:
    run = simulate(hand_made(2, [[(0, 1), (1, 0)]]), ethernet(2), S)
    assert run.time_s == pytest.approx(1e-4 + S * 1e-9)


@pytest.mark.parametrize("by_chunk", [True, False])
def test_there_is_no_barrier_between_steps(by_chunk: bool) -> None:
    """0→1 is slow; 2→3 and then 3→4 do not wait for it."""
    program = hand_made(5, [[(0, 1), (2, 3)], [(3, 4)]])
    slow = Conditions(slow_links={(0, 1): 10})
    run = simulate(program, ethernet(5), S, conditions=slow, by_chunk=by_chunk)
    alone = 1e-4 + S * 1e-9
    assert run.finish_s[4] == pytest.approx(2 * alone)
    assert run.time_s == pytest.approx(10 * alone)


def test_only_the_chunks_that_are_read_must_be_there() -> None:
    """Rank 1 waits for chunk 0 from a slow link, and sends its own chunk 1 meanwhile."""
    b = Builder("mine", "broadcast", num_ranks=3, num_chunks=2)
    b.copy((0, OUTPUT, 0), (1, OUTPUT, 0)).step()
    b.copy((1, OUTPUT, 1), (2, OUTPUT, 1)).step()
    slow = Conditions(slow_links={(0, 1): 10})
    run = simulate(b.build(), ethernet(3), S, conditions=slow)
    assert run.finish_s[2] == pytest.approx(1e-4 + S / 2 * 1e-9)
    coarse = simulate(b.build(), ethernet(3), S, conditions=slow, by_chunk=False)
    assert coarse.finish_s[2] >= run.finish_s[2]


def test_reductions_take_time_one_after_another_on_their_rank() -> None:
    b = Builder("mine", "reduce", num_ranks=3, num_chunks=1)
    b.reduce((1, INPUT, 0), (0, OUTPUT, 0)).reduce((2, INPUT, 0), (0, OUTPUT, 0)).step()
    run = simulate(b.build(), ethernet(3), S)
    assert run.time_s == pytest.approx(1e-4 + 2 * S * 1e-9 + 2 * S * 0.2e-9)


def test_slices_of_a_chain_overlap() -> None:
    """Broadcast of m slices down a chain: (P − 2 + m) steps of one slice each, not (P − 1)·m."""
    p, m = 5, 16
    b = Builder("chain", "broadcast", num_ranks=p, num_chunks=m)
    for t in range(p - 2 + m):
        for r in range(p - 1):
            if 0 <= t - r < m:
                b.copy((r, OUTPUT, t - r), (r + 1, OUTPUT, t - r))
        b.step()
    want = (p - 2 + m) * (1e-4 + S / m * 1e-9)
    for by_chunk in (True, False):
        assert simulate(b.build(), ethernet(p), S, by_chunk=by_chunk).time_s == pytest.approx(want)


@pytest.mark.parametrize("local", [1, 2, 4])
def test_ranks_behind_one_nic_share_it(local: int) -> None:
    net = topologies.parse(f"cluster(hosts=2, local={local}, gbit=8, latency_us=100)")
    program = hand_made(2 * local, [[(r, local + r) for r in range(local)]])
    assert simulate(program, net, S).time_s == pytest.approx(1e-4 + local * S * 1e-9)
    rails = topologies.parse(f"cluster(hosts=2, local={local}, gbit=8, latency_us=100, rails={local})")
    assert simulate(program, rails, S).time_s == pytest.approx(1e-4 + S * 1e-9)


def test_a_shared_link_works_from_its_first_user_on() -> None:
    """Rank 0 is late: until it comes its neighbour has the NIC, which is never idle and never too fast."""
    net = topologies.parse("cluster(hosts=2, local=2, gbit=8, latency_us=100)")
    program = hand_made(4, [[(0, 2), (1, 3)]])
    for late in (0.0, 0.004, 0.5):
        run = simulate(program, net, S, conditions=Conditions(late_s={0: late}))
        assert run.time_s == pytest.approx(1e-4 + max(2 * S * 1e-9, late + S * 1e-9))


def test_trunk_contention() -> None:
    net = topologies.parse("dumbbell(ranks=8, gbit=8, trunk_gbit=8, latency_us=50, trunk_latency_us=50)")
    across = simulate(hand_made(8, [[(r, 4 + r) for r in range(4)]]), net, S).time_s
    within = simulate(hand_made(8, [[(0, 1), (2, 3), (4, 5), (6, 7)]]), net, S).time_s
    assert across == pytest.approx(1e-4 + 4 * S * 1e-9)
    assert within == pytest.approx(5e-5 + S * 1e-9)


def test_late_rank_delays_a_ring_by_its_lateness() -> None:
    program = collectives.build("ring", "all_reduce", 8)
    base = simulate(program, ethernet(8), S).time_s
    late = simulate(program, ethernet(8), S, conditions=Conditions(late_s={3: 5.0})).time_s
    assert late == pytest.approx(base + 5.0)


def test_slow_rank_dominates_a_ring() -> None:
    """Every step of the ring passes the slow rank: about its factor times slower."""
    program = collectives.build("ring", "all_reduce", 16)
    base = simulate(program, ethernet(16), S).time_s
    slow = simulate(program, ethernet(16), S, conditions=Conditions(slowdown={3: 4.0})).time_s
    assert 3.4 * base < slow < 4.0 * base


@pytest.mark.parametrize(
    "conditions",
    [
        Conditions(),
        Conditions(slow_links={(3, 4): 4.0}),
        Conditions(late_s={5: 0.3}),
        Conditions(slowdown={7: 3.0, 9: 1.5}),
    ],
)
@pytest.mark.parametrize("operation", ["all_reduce", "reduce_scatter", "all_gather"])
def test_skipping_steady_steps_is_exact(operation: str, conditions: Conditions) -> None:
    program = collectives.build("ring", operation, 64)
    every = simulate(program, ethernet(64), S, conditions=conditions, record=True, by_chunk=False)
    fast = simulate(program, ethernet(64), S, conditions=conditions, by_chunk=False)
    exact = simulate(program, ethernet(64), S, conditions=conditions, by_chunk=True)
    np.testing.assert_allclose(fast.finish_s, every.finish_s, rtol=1e-9)
    np.testing.assert_allclose(fast.finish_s, exact.finish_s, rtol=1e-9)
    np.testing.assert_allclose(fast.sent_bytes, every.sent_bytes, rtol=1e-9)
    assert fast.steps == every.steps


def test_sixteen_thousand_ranks_in_a_ring() -> None:
    p = 16384
    program = collectives.build("ring", "all_reduce", p)
    run = simulate(program, ethernet(p), 1e8)
    want = 2 * (p - 1) * 1e-4 + 2 * (p - 1) / p * 1e8 * 1e-9 + (p - 1) / p * 1e8 * 0.2e-9
    assert run.time_s == pytest.approx(want, rel=1e-6)
    assert run.steps == 2 * (p - 1)
    assert run.bytes_sent_per_rank == pytest.approx(2 * (p - 1) / p * 1e8)


def test_events_are_every_message() -> None:
    run = simulate(collectives.build("ring", "all_reduce", 4), ethernet(4), S, record=True)
    events = run.events
    assert events is not None
    assert len(events.step) == 6 * 4
    assert events.is_reduce.sum() == 3 * 4
    assert (events.start_s < events.end_s).all()
    assert (events.end_s <= events.done_s).all()
    assert events.done_s.max() == pytest.approx(run.time_s)


def test_one_rank_takes_no_time() -> None:
    run = simulate(collectives.build("ring", "all_reduce", 1), ethernet(1), S, record=True)
    assert (run.time_s, run.steps, run.bytes_sent_per_rank) == (0.0, 0, 0.0)


@pytest.mark.parametrize(
    ("conditions", "says"),
    [
        (Conditions(late_s={9: 1.0}), "rank 9"),
        (Conditions(late_s={1: -1.0}), "late"),
        (Conditions(slowdown={0: 0.0}), "slowdown"),
        (Conditions(slow_links={(0, 4): 2.0}), "rank 4"),
    ],
)
def test_impossible_conditions_are_refused(conditions: Conditions, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        simulate(collectives.build("ring", "all_reduce", 4), ethernet(4), S, conditions=conditions)


def test_topology_and_program_must_agree() -> None:
    with pytest.raises(ConfigError, match="4 ranks"):
        simulate(collectives.build("ring", "all_reduce", 4), ethernet(5), S)
    with pytest.raises(ConfigError, match="bytes"):
        simulate(collectives.build("ring", "all_reduce", 4), ethernet(4), -1)


def test_every_message_costs_its_overhead() -> None:
    """Three messages from one port: three overheads, one latency; two chunks for one rank are one message."""
    net = topologies.parse("ethernet(gbit=8, latency_us=100, message_us=10)", num_ranks=4)
    assert net.uniform() is None
    assert simulate(hand_made(4, [[(0, 1), (0, 2), (0, 3)]]), net, S).time_s == pytest.approx(
        1e-4 + 3e-5 + 3 * S * 1e-9
    )
    b = Builder("mine", "broadcast", num_ranks=4, num_chunks=2)
    b.copy((0, OUTPUT, 0), (1, OUTPUT, 0)).copy((0, OUTPUT, 1), (1, OUTPUT, 1)).step()
    assert simulate(b.build(), net, S).time_s == pytest.approx(1e-4 + 1e-5 + S * 1e-9)
    assert message_s(net, 0, 1, S) == pytest.approx(1e-4 + 1e-5 + S * 1e-9)
