"""Dissemination barrier: in step k every rank tells the rank 2^k further on who has arrived.

Source: Hensgen, Finkel & Manber, IJPP 17(1), 1988.
Cost: ⌈lg P⌉ steps of one empty message per rank.
Ranks: any.   [tested]
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from paceline.schedule.cost import Cost, No, only
from paceline.schedule.program import INPUT, Program, Step, copy, ranks, reduce, turn

OPERATIONS = ("barrier",)
ALIASES = ("dissemination_barrier",)


def build(operation: str, num_ranks: int, *, root: int = 0) -> Program:
    """Build the barrier: an empty chunk stands for the ranks that have arrived; a reduction joins them."""
    p, me = num_ranks, ranks(num_ranks)

    def steps() -> Iterator[Step]:
        yield copy(me, me, 0, source=INPUT)
        for k in range((p - 1).bit_length()):
            yield reduce(me, turn(p, 1 << k), 0)

    return Program("dissemination", operation, p, 1, steps)


def supports(operation: str, num_ranks: int) -> bool | No:
    """Any number of ranks."""
    return only(OPERATIONS, operation)


def cost(operation: str, num_ranks: int, *, root: int = 0) -> Cost:
    """⌈lg P⌉ steps; the shares are of a chunk that is empty."""
    n = (num_ranks - 1).bit_length()
    return Cost(n, n, Fraction(n), Fraction(n))
