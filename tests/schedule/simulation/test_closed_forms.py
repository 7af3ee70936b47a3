"""Simulated time equals the closed form of METHODS on a homogeneous network, for everything shipped."""

from __future__ import annotations

import math

import pytest

from paceline import collectives
from paceline.schedule import topologies
from paceline.schedule.simulation.simulate import simulate

ALPHA, BETA, GAMMA, S = 1e-4, 1e-9, 0.2e-9, 1e7
RANKS = (1, 2, 3, 4, 5, 7, 8, 12, 16, 17, 31, 64)
NO_CLOSED_FORM = {"double_binary_tree"}
OVERLAPPING = {"double_binary_tree", "ring_chunked", "pat", "bine_tree"}
FOLDED = {
    ("halving_doubling", "reduce_scatter"),
    ("recursive_doubling", "all_reduce"),
    ("pat", "reduce_scatter"),
    *(("bine_tree", operation) for operation in ("reduce", "gather", "scatter")),
}


def network(p: int) -> topologies.Topology:
    return topologies.parse("ethernet(gbit=8, latency_us=100, reduce_gbyte=5)", num_ranks=p)


@pytest.mark.parametrize("name", sorted(collectives.algorithms()))
def test_simulation_agrees_with_the_claimed_closed_form(name: str) -> None:
    for operation in collectives.find(name).OPERATIONS:
        for p in RANKS:
            if not collectives.supports(name, operation, p):
                continue
            claim = collectives.cost(name, operation, p)
            size = 0.0 if operation == "barrier" else S
            want = claim.time_s(size, latency_s=ALPHA, seconds_per_byte=BETA, reduce_seconds_per_byte=GAMMA)
            program = collectives.build(name, operation, p)
            run = simulate(program, network(p), S)
            assert run.steps == claim.steps
            assert run.bytes_sent_per_rank == pytest.approx(float(claim.sent) * size)
            if want is None:
                folded = (name, operation.removesuffix("_v")) in FOLDED and p & (p - 1)
                assert name in NO_CLOSED_FORM or folded
            else:
                assert run.time_s == pytest.approx(want, rel=1e-6), (operation, p)
            coarse = simulate(program, network(p), S, by_chunk=False)
            if name not in OVERLAPPING:
                assert coarse.time_s == pytest.approx(run.time_s, rel=1e-6), (operation, p)
            assert coarse.time_s >= run.time_s * (1 - 1e-9)


@pytest.mark.parametrize("p", [2, 4, 8, 16, 64])
def test_formulas_of_the_literature(p: int) -> None:
    """Written out again, so that a wrong claim and a wrong simulation cannot agree with each other."""
    lg, share = int(math.log2(p)), (p - 1) / p
    a, b, c = ALPHA, S * BETA, S * GAMMA
    table = {
        ("ring", "all_reduce"): 2 * (p - 1) * a + 2 * share * b + share * c,
        ("recursive_doubling", "all_reduce"): lg * (a + b + c),
        ("swing", "all_reduce"): 2 * lg * a + 2 * share * b + share * c,
        ("bine_tree", "broadcast"): lg * (a + b),
        ("bine_tree", "scatter"): lg * a + share * b,
        ("bine_tree", "gather"): lg * a + share * b,
        ("bine_tree", "reduce"): lg * (a + b + c),
        ("pat", "all_gather"): lg * a + share * b,
        ("pat", "reduce_scatter"): lg * a + share * (b + c),
        ("halving_doubling", "all_reduce"): 2 * lg * a + 2 * share * b + share * c,
        ("reduction_tree", "all_reduce"): 2 * lg * (a + b) + lg * c,
        ("bruck", "all_gather"): lg * a + share * b,
        ("bruck", "all_to_all"): lg * a + lg * b / 2,
        ("pairwise", "all_to_all"): (p - 1) * a + share * b,
        ("dissemination", "barrier"): lg * a,
        ("binomial_tree", "broadcast"): lg * (a + b),
        ("binomial_tree", "scatter"): lg * a + share * b,
        ("binomial_tree", "gather"): lg * a + share * b,
        ("binomial_tree", "reduce"): lg * (a + b + c),
        ("chain", "broadcast"): (p - 2 + 8) * (a + b / 8),
    }
    for (name, operation), want in table.items():
        got = simulate(collectives.build(name, operation, p), network(p), S).time_s
        assert got == pytest.approx(want, rel=1e-6), name


@pytest.mark.parametrize(("hosts", "local"), [(2, 2), (4, 2), (2, 4), (8, 8)])
def test_hybrid_on_a_two_level_cluster(hosts: int, local: int) -> None:
    """2(L−1)α_l + 2(L−1)/L·Sβ_l + (L−1)/L·Sγ + halving-doubling of M hosts, S/L each, at L·β."""
    text = f"cluster(hosts={hosts}, local={local}, gbit=8, latency_us=100, local_gbyte=10, local_latency_us=2"
    m, share, outer = hosts, (local - 1) / local, (hosts - 1) / hosts
    inside = 2 * (local - 1) * 2e-6 + 2 * share * S * 1e-10 + share * S * GAMMA
    for rails in (1, local):
        net = topologies.parse(f"{text}, reduce_gbyte=5, rails={rails})")
        program = collectives.build("hybrid", "all_reduce", net.num_ranks, hosts=net.hosts)
        lanes = local / rails
        across = 2 * math.log2(m) * ALPHA + outer * S / local * (2 * lanes * BETA + GAMMA)
        assert simulate(program, net, S).time_s == pytest.approx(inside + across, rel=1e-6)


@pytest.mark.parametrize("p", [8, 16, 32, 64])
def test_double_binary_tree_stays_below_its_approximation_and_reaches_full_bandwidth(p: int) -> None:
    """Between 2S·β and 2(lg P + m)(α + S/(2m)·2β), and near 2S·β + few slices for many segments."""
    for m in (4, 16, 256):
        program = collectives.build("double_binary_tree", "all_reduce", p, segments=m)
        got = simulate(program, network(p), S).time_s
        assert got <= 2 * (math.log2(p) + m) * (ALPHA + S / m * (BETA + GAMMA))
    net = topologies.parse("ethernet(gbit=8, latency_us=0, reduce_gbyte=1000)", num_ranks=p)
    fine = collectives.build("double_binary_tree", "all_reduce", p, segments=512)
    assert simulate(fine, net, S).time_s == pytest.approx(2 * S * BETA, rel=0.05)


def test_chunked_ring_hides_the_reduction() -> None:
    whole = simulate(collectives.build("ring", "all_reduce", 8), network(8), 1e9).time_s
    parts = simulate(collectives.build("ring_chunked", "all_reduce", 8), network(8), 1e9).time_s
    assert whole - parts == pytest.approx(7 / 8 * 1e9 * GAMMA, rel=0.01)
