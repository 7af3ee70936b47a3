"""Claimed steps and bytes are the counted ones, and the textbook's."""

from __future__ import annotations

import ast
import inspect
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline import collectives
from paceline.collectives import double_binary_tree, ring
from paceline.collectives.verification.sweep import cases
from paceline.errors import ConfigError
from paceline.schedule import contract
from paceline.schedule.builder import Builder
from paceline.schedule.cost import Cost, count
from paceline.schedule.lowering.lower import lower
from paceline.schedule.program import INPUT, OUTPUT, chunk_offsets
from paceline.schedule.verification.verify import verify


@pytest.mark.parametrize("name", collectives.names())
def test_claims_are_counted(name: str) -> None:
    for case in cases([*range(1, 18), 24, 31, 32, 33, 64], algorithms=[name]):
        if case.root in (0, 1, case.num_ranks - 1):
            claim = collectives.cost(name, case.operation, case.num_ranks, root=case.root, **case.options)
            assert count(case.build()) == claim, case


@pytest.mark.parametrize("name", collectives.names())
def test_claims_with_parallel_copies(name: str) -> None:
    for case in cases((2, 5, 8), algorithms=[name]):
        copies = {"channels": 2, "instances": 2}
        claim = collectives.cost(
            name, case.operation, case.num_ranks, root=case.root, **case.options, **copies
        )
        program = collectives.build(
            name, case.operation, case.num_ranks, root=case.root, **case.options, **copies
        )
        assert count(program) == claim, case


def lg(p: int) -> int:
    return p.bit_length() - 1


@pytest.mark.parametrize("p", range(2, 40))
def test_textbook_figures(p: int) -> None:
    """The table of the literature, written down independently of the algorithms' files."""
    share, is_power = Fraction(p - 1, p), p & (p - 1) == 0
    up = (p - 1).bit_length()

    def of(name: str, operation: str = "all_reduce", **options: int) -> Cost:
        return count(collectives.build(name, operation, p, **options))

    assert of("ring") == Cost(2 * (p - 1), 2 * (p - 1), 2 * share, share)
    assert of("pairwise_exchange").steps == (lg(p) if is_power else lg(p) + 2)
    assert of("halving_doubling").steps == (2 * lg(p) if is_power else 2 * lg(p) + 2)
    if is_power:
        assert of("halving_doubling").sent == 2 * share
        assert of("halving_doubling").reduced == share
        assert of("recursive_doubling").sent == of("recursive_doubling").reduced == lg(p)
        two = of("bcube", base=2)
        assert (two.steps, two.sent) == (2 * lg(p), 2 * share)
    assert of("all_pairs", shots=1) == Cost(1, p - 1, Fraction(p - 1), Fraction(p - 1))
    assert of("all_pairs", shots=2).sent == 2 * share and of("all_pairs", shots=2).steps == 2
    assert of("reduction_tree").steps == 2 * up
    assert of("dissemination", "barrier").steps == up
    assert of("bruck", "all_gather") == Cost(up, up, share)
    assert of("bruck", "all_to_all").steps == up
    assert of("bruck", "all_to_all").sent <= Fraction(up, 2) + (0 if is_power else 1)
    assert of("pairwise", "all_to_all") == Cost(p - 1, p - 1, share)
    assert of("chain", "broadcast", segments=5).steps == p + 3
    assert of("binomial_tree", "scatter").sent == share
    assert of("binomial_tree", "broadcast").steps == up
    if p % 2 == 0:
        assert of("neighbor_exchange", "all_gather") == Cost(p // 2, p // 2, share)


def test_bcube_of_base_three() -> None:
    assert count(collectives.build("bcube", "all_reduce", 9, base=3)) == Cost(
        4, 8, Fraction(16, 9), Fraction(8, 9)
    )
    with pytest.raises(ConfigError, match="no power of base 2"):
        collectives.build("bcube", "all_reduce", 9, base=2)


@pytest.mark.parametrize("p", range(2, 66))
def test_double_binary_tree_shape(p: int) -> None:
    """Inner ranks of one tree are leaves of the other, except the roots, and one rank when P is odd."""
    both = double_binary_tree.trees("all_reduce", p, 0)
    inner = [set(parent[parent >= 0].tolist()) for parent, _ in both]
    roots = {int(np.flatnonzero(parent < 0)[0]) for parent, _ in both}
    assert len(roots) == 2
    twice = (inner[0] & inner[1]) - roots
    assert len(inner[0] & inner[1]) <= (1 if p % 2 else 0) + (2 if p == 2 else 0), twice
    assert all(int(level.max()) <= (p - 1).bit_length() for _, level in both)
    assert count(collectives.build("double_binary_tree", "all_reduce", p)).sent <= 2 + Fraction(1, 2) * (
        p % 2
    )


def test_two_step_sends_few_messages_between_hosts() -> None:
    program = collectives.build("two_step", "all_to_all", 12, hosts=[0] * 4 + [1] * 4 + [2] * 4)
    between = [
        (o.src_rank, o.dst_rank)
        for step in program.steps()
        for o in step.ops()
        if o.src_rank // 4 != o.dst_rank // 4
    ]
    assert all(len({d for s, d in between if s == rank}) == 2 for rank in range(12))
    assert len(between) == 12 * 8


def test_hosts_may_be_named_in_any_order() -> None:
    program = collectives.build("hierarchical", "all_reduce", 5, hosts=["b", "a", "b", "a", "b"])
    assert count(program).steps == 4
    with pytest.raises(ConfigError, match="one host per rank"):
        collectives.build("hierarchical", "all_reduce", 5, hosts=["a", "b"])
    with pytest.raises(ConfigError, match="hierarchical takes any"):
        collectives.build("hybrid", "all_reduce", 5, hosts=["b", "a", "b", "a", "b"])


def test_the_ring_is_short() -> None:
    """The algorithm of ring.py, without its claims and imports, is under 30 lines of code."""
    tree = ast.parse(inspect.getsource(ring))
    build = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "build")
    assert build.end_lineno is not None
    assert build.end_lineno - build.lineno + 1 < 30


def test_large_programs_stay_small() -> None:
    """16,384 ranks: every step is a few arrays of P, most of them shared."""
    program = collectives.build("ring", "all_reduce", 16384)
    steps = iter(program.steps())
    next(steps)
    first, second = next(steps), next(steps)
    assert len(first) == 16384 and first.dst_rank is second.dst_rank
    assert first.src_chunk.base is second.src_chunk.base
    assert count(collectives.build("halving_doubling", "all_reduce", 16384)).steps == 28


@pytest.mark.parametrize("numel, parts", [(0, 3), (2, 5), (10, 3), (1000, 7)])
def test_partition_is_balanced(numel: int, parts: int) -> None:
    sizes = np.diff(chunk_offsets(numel, parts))
    assert sizes.sum() == numel and sizes.max() - sizes.min() <= 1
    assert (np.diff(sizes) <= 0).all()


def test_builder_makes_programs_by_hand() -> None:
    b = Builder("mine", "broadcast", num_ranks=3, num_chunks=1, root=1)
    b.copy((1, INPUT, 0), (1, OUTPUT, 0)).step()
    b.copy((1, OUTPUT, 0), (0, OUTPUT, 0)).copy((1, OUTPUT, 0), (2, OUTPUT, 0))
    program = b.build()
    assert count(program) == Cost(1, 2, Fraction(2))
    assert [i.verb for i in lower(program).instructions[1]] == ["send", "send", "copy"]


def test_bad_requests_are_refused() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'ring'"):
        collectives.build("rng", "all_reduce", 2)
    with pytest.raises(ConfigError, match="root 5 is not one of the ranks"):
        collectives.build("chain", "broadcast", 3, root=5)
    with pytest.raises(ConfigError, match="it is meant for"):
        collectives.build("ring", "broadcast", 3)
    with pytest.raises(ConfigError, match="even number"):
        collectives.build("neighbor_exchange", "all_gather", 3)
    with pytest.raises(ConfigError, match="at least one rank"):
        collectives.build("ring", "all_reduce", 0)
    with pytest.raises(ConfigError, match=r"unknown option of chain 'segmnets'\. Did you mean 'segments'"):
        collectives.build("chain", "broadcast", 3, segmnets=2)
    with pytest.raises(ConfigError, match="segments: 1 or more expected, got 0"):
        collectives.build("chain", "broadcast", 3, segments=0)
    with pytest.raises(ConfigError, match="at least one channel"):
        collectives.build("ring", "all_reduce", 3, channels=0)
    assert collectives.find("pairwise_exchange") is collectives.find("recursive_doubling")


@pytest.mark.parametrize("segments", [1, 2, 5])
@pytest.mark.parametrize("name", ["chain", "ring_chunked", "double_binary_tree"])
def test_any_number_of_segments(name: str, segments: int) -> None:
    for case in cases((1, 2, 3, 6), algorithms=[name]):
        options = {"root": case.root, "segments": segments}
        program = collectives.build(name, case.operation, case.num_ranks, **options)
        assert count(program) == collectives.cost(name, case.operation, case.num_ranks, **options)
        assert verify(program).messages >= (case.num_ranks > 1)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=9))
def test_ranks_on_any_hosts(hosts: list[str]) -> None:
    """Unequal hosts, ranks of a host not next to one another, hosts of one rank."""
    p = len(hosts)
    for name, operation in (
        ("hierarchical", "all_reduce"),
        ("two_step", "all_to_all"),
        ("hybrid", "all_reduce"),
    ):
        if collectives.supports(name, operation, p, hosts=hosts):
            program = collectives.build(name, operation, p, hosts=hosts)
            assert count(program) == collectives.cost(name, operation, p, hosts=hosts)
            verify(program)
        else:
            assert name == "hybrid"


def test_both_ways_to_write_postconditions_agree() -> None:
    for case in cases((1, 3, 4)):
        program = case.build()
        for rank in range(case.num_ranks):
            rows = contract.contributors(program, rank).tolist()
            assert contract.masks(program, rank) == [sum(n << r for r, n in enumerate(row)) for row in rows]


def test_programs_too_large_to_hold_are_refused() -> None:
    for name, operation in (("all_pairs", "all_reduce"), ("bruck", "all_to_all"), ("two_step", "all_to_all")):
        with pytest.raises(ConfigError, match="at most 1024"):
            collectives.build(name, operation, 4096)
    for name in ("hierarchical", "hybrid", "double_binary_tree", "bcube"):
        assert count(collectives.build(name, "all_reduce", 4096)).sent <= 3
