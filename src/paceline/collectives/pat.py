"""PAT, parallel aggregated trees: all-gather and reduce-scatter, far messages small, buffers bounded.

Bruck's algorithm with its steps reversed: the first message goes the farthest and holds one block, so that
distant links carry the fewest bytes. For every block there is a binomial tree rooted at its owner; the trees
of all blocks run at once, each rotated by one rank. What goes to the same rank in the same step travels in
one message. `aggregation` bounds how many blocks that are: the trees are then walked depth first below the
top, so that a reduce-scatter needs `aggregation` times lg P blocks of memory instead of P, at the price of
more steps.

Source: Jeaugey, PAT, arXiv 2506.20252, 2025; NCCL 2.23.
Cost: ⌈lg P⌉ steps, or lg A + 2^⌈lg P⌉/A − 1 with A blocks in a message; (P−1)/P of the bytes per rank.
Ranks: any.   [tested]
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from paceline.schedule.contract import base_operation
from paceline.schedule.cost import Cost, No, few_enough, only
from paceline.schedule.program import INPUT, SCRATCH, IntArray, Program, Step, copy, ranks, reduce

OPERATIONS = ("all_gather", "reduce_scatter", "all_gather_v", "reduce_scatter_v")
VARIANTS: tuple[dict[str, int], ...] = ({}, {"aggregation": 1}, {"aggregation": 2})


def build(operation: str, num_ranks: int, *, root: int = 0, aggregation: int | None = None) -> Program:
    """Build the program for any number of ranks.

    Args:
        aggregation: The most blocks in a message, at least 1 (rounded down to a power of two); default: as
            many as one step per distance needs, half of all. Fewer bound the memory of a reduce-scatter.
    """
    p, op = num_ranks, base_operation(operation)
    low = _low_bits(p, aggregation)
    if op == "all_gather":
        return Program("pat", operation, p, p, lambda: _all_gather(p, low))
    scratch = ((p - 1 >> low) + 1) * (low + 1)
    return Program("pat", operation, p, p, lambda: _reduce_scatter(p, low), num_scratch=scratch)


def _low_bits(p: int, aggregation: int | None) -> int:
    """How many of the lowest bits of an offset are walked depth first; those above, breadth first."""
    bits = (p - 1).bit_length()
    return 0 if aggregation is None else max(0, bits - (aggregation.bit_length() - 1))


def edges(p: int, low: int) -> list[tuple[int, IntArray]]:
    """For every step: how far it sends, and the offsets from a block's owner of those that receive it.

    The rank at an offset receives from the one at the offset without its lowest bit.
    """
    found = []
    for k in reversed(range(low, (p - 1).bit_length())):
        found.append((1 << k, np.arange(1 << k, p, 2 << k, dtype=np.intp)))
    for j in range(1, min(1 << low, p)):
        found.append((j & -j, np.arange(j, p, 1 << low, dtype=np.intp)))
    return found


def _every(p: int, offsets: IntArray) -> tuple[IntArray, IntArray]:
    """All (rank, offset) pairs, both of shape (P · number of offsets,)."""
    return np.repeat(ranks(p), len(offsets)), np.tile(offsets, p)


def _all_gather(p: int, low: int) -> Iterator[Step]:
    me = ranks(p)
    yield copy(me, me, 0, to=me, source=INPUT)
    for distance, receivers in edges(p, low):
        rank, offset = _every(p, receivers - distance)
        yield copy(rank, (rank + distance) % p, (rank - offset) % p)


def _reduce_scatter(p: int, low: int) -> Iterator[Step]:
    """The same edges backwards. A rank keeps one partial sum for each place that it has in a tree at a time.

    In a subtree of the lowest bits no two ranks of one level wait for sums at once: a place is the number of
    the subtree and the level.
    """
    me, size = ranks(p), 1 << low
    levels = np.array([low, *((j & -j).bit_length() - 1 for j in range(1, size))], dtype=np.intp)
    begun = np.zeros(p, dtype=bool)  # offsets with a partial sum

    def place(offset: IntArray) -> IntArray:
        return (offset // size) * (low + 1) + levels[offset % size]

    for distance, senders in reversed(edges(p, low)):
        above = senders - distance
        new = above[~begun[above]]
        begun[new] = True
        if len(new):
            rank, offset = _every(p, new)
            yield copy(rank, rank, (rank - offset) % p, to=place(offset), source=INPUT, into=SCRATCH)
        rank, offset = _every(p, senders)
        is_sum = begun[offset]
        chunk = np.where(is_sum, place(offset), (rank - offset) % p)
        yield reduce(
            rank,
            (rank - distance) % p,
            chunk,
            to=place(offset - distance),
            source=np.where(is_sum, SCRATCH, INPUT),
            into=SCRATCH,
        )
    if begun[0]:
        yield copy(me, me, place(np.zeros(p, dtype=np.intp)), to=0, source=SCRATCH)
    else:
        yield copy(me, me, me, to=0, source=INPUT)


def supports(operation: str, num_ranks: int, *, aggregation: int | None = None) -> bool | No:
    """Any number of ranks, as long as P² transfers fit in memory."""
    if aggregation is not None and aggregation < 1:
        return No(f"aggregation: 1 or more blocks expected, got {aggregation}")
    return few_enough(num_ranks, num_ranks // 2) and only(OPERATIONS, operation)


def cost(operation: str, num_ranks: int, *, root: int = 0, aggregation: int | None = None) -> Cost:
    """A step per distance, or per message of at most `aggregation` blocks; each block once to each rank."""
    p, low = num_ranks, _low_bits(num_ranks, aggregation)
    steps = (p - 1).bit_length() - low + min(1 << low, p) - 1
    share = Fraction(p - 1, p)
    if base_operation(operation) == "all_gather":
        return Cost(steps, steps, share)
    is_regular = low == 0 and p & (p - 1) == 0  # else reductions overlap transfers
    return Cost(steps, steps, share, share, has_closed_form=is_regular)
