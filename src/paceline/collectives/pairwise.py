"""Pairwise all-to-all: in each step every rank sends one block to one rank and receives one.

Source: textbook; Thakur, Rabenseifner & Gropp, IJHPCA 19(1), 2005.
Cost: P−1 steps, (P−1)/P of the bytes sent per rank.
Ranks: any; for a power of two, partners swap (rank xor step), so in place needs no extra memory.   [tested]
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from paceline.schedule.cost import Cost, No, only
from paceline.schedule.program import INPUT, Program, Step, copy, ranks, turn

OPERATIONS = ("all_to_all", "all_to_all_v")
ALIASES = ("pairwise_all_to_all",)


def build(operation: str, num_ranks: int, *, root: int = 0) -> Program:
    """Build the exchange of blocks."""
    p, me = num_ranks, ranks(num_ranks)
    is_power = p & (p - 1) == 0

    def steps() -> Iterator[Step]:
        for t in range(p):  # step 0 is each rank's own block
            peer = me ^ t if is_power else turn(p, t)
            yield copy(me, me if t == 0 else peer, peer, to=me, source=INPUT)

    return Program("pairwise", operation, p, p, steps)


def supports(operation: str, num_ranks: int) -> bool | No:
    """Any number of ranks."""
    return only(OPERATIONS, operation)


def cost(operation: str, num_ranks: int, *, root: int = 0) -> Cost:
    """P − 1 steps of one message per rank."""
    p = num_ranks
    return Cost(p - 1, (p - 1), Fraction(p - 1, p))
