"""Bruck: all-gather and all-to-all in ⌈lg P⌉ steps for any number of ranks.

Source: Bruck et al., IEEE TPDS 8(11), 1997.
Cost: ⌈lg P⌉ steps; all_gather sends (P−1)/P of the bytes per rank, all_to_all about half in every step.
Ranks: any.   [tested]
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from paceline.schedule.contract import base_operation
from paceline.schedule.cost import Cost, No, few_enough, only
from paceline.schedule.program import INPUT, SCRATCH, Program, Step, copy, ranks, replicate, together, turn

OPERATIONS = ("all_gather", "all_to_all", "all_gather_v", "all_to_all_v")


def build(operation: str, num_ranks: int, *, root: int = 0, channels: int = 1, instances: int = 1) -> Program:
    """Bruck's algorithm."""
    p, op = num_ranks, base_operation(operation)
    make = _all_gather if op == "all_gather" else _all_to_all
    scratch = 0 if op == "all_gather" else p
    program = Program("bruck", operation, p, p, lambda: make(p), num_scratch=scratch)
    return replicate(program, channels * instances)


def _all_gather(p: int) -> Iterator[Step]:
    """Rank r has blocks r, r + 1 … (mod P) and hands as many as are missing to the rank 2^k below."""
    me = ranks(p)
    yield copy(me, me, 0, to=me, source=INPUT)
    for k in range((p - 1).bit_length()):
        n = min(1 << k, p - (1 << k))
        peer = turn(p, -(1 << k))
        before_end = np.minimum(n, p - me)
        yield together(
            copy(me, peer, me, count=before_end),
            copy(me, peer, 0, count=n - before_end),
        )


def _all_to_all(p: int) -> Iterator[Step]:
    """SCRATCH[i] is on its way to i ranks further on; step k carries it 2^k ranks if i has that bit."""
    me = ranks(p)
    distance = np.repeat(ranks(p), p)
    rank = np.tile(me, p)
    yield copy(rank, rank, (rank + distance) % p, to=distance, source=INPUT, into=SCRATCH)
    for k in range((p - 1).bit_length()):
        moves = (distance >> k) & 1 == 1
        to = (rank[moves] + (1 << k)) % p
        yield copy(rank[moves], to, distance[moves], source=SCRATCH, into=SCRATCH)
    yield copy(rank, rank, distance, to=(rank - distance) % p, source=SCRATCH)


def supports(operation: str, num_ranks: int) -> bool | No:
    """Any number of ranks."""
    if base_operation(operation) == "all_to_all" and not (answer := few_enough(num_ranks, num_ranks)):
        return answer
    return only(OPERATIONS, operation)


def cost(operation: str, num_ranks: int, *, root: int = 0, channels: int = 1, instances: int = 1) -> Cost:
    """Claimed cost."""
    p, n = num_ranks, (num_ranks - 1).bit_length()
    if base_operation(operation) == "all_gather":
        return Cost(n, n * channels * instances, Fraction(p - 1, p))
    ones = sum(i.bit_count() for i in range(p))
    return Cost(n, n * channels * instances, Fraction(ones, p))
