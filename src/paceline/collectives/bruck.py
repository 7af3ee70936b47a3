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
from paceline.schedule.program import INPUT, SCRATCH, Program, Step, copy, ranks, together, turn

OPERATIONS = ("all_gather", "all_to_all", "all_gather_v", "all_to_all_v")


def build(operation: str, num_ranks: int, *, root: int = 0) -> Program:
    """Build the program for any number of ranks."""
    p, op = num_ranks, base_operation(operation)
    make = _all_gather if op == "all_gather" else _all_to_all
    scratch = 0 if op == "all_gather" else p
    return Program("bruck", operation, p, p, lambda: make(p), num_scratch=scratch)


def _all_gather(p: int) -> Iterator[Step]:
    """Rank r holds blocks r, r + 1 … (mod P); in step k it sends the rank 2^k below those that it lacks."""
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
    """SCRATCH[i] is for the rank i places further on; step k moves it by 2^k ranks if bit k of i is set."""
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
    """Any number of ranks; for all_to_all as long as P² transfers fit in memory."""
    if base_operation(operation) == "all_to_all" and not (answer := few_enough(num_ranks, num_ranks)):
        return answer
    return only(OPERATIONS, operation)


def cost(operation: str, num_ranks: int, *, root: int = 0) -> Cost:
    """⌈lg P⌉ steps of one message per rank."""
    p, n = num_ranks, (num_ranks - 1).bit_length()
    if base_operation(operation) == "all_gather":
        return Cost(n, n, Fraction(p - 1, p))
    ones = sum(i.bit_count() for i in range(p))
    return Cost(n, n, Fraction(ones, p))
