"""Dissemination barrier: in step k every rank tells the rank 2^k further on what it has heard.

Source: Hensgen, Finkel & Manber, IJPP 17(1), 1988.
Cost: ⌈lg P⌉ steps of one empty message per rank.
Ranks: any.   [tested]
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from paceline.schedule.cost import Cost, No, only
from paceline.schedule.program import INPUT, Program, Step, copy, ranks, reduce, replicate, turn

OPERATIONS = ("barrier",)
ALIASES = ("dissemination_barrier",)


def build(operation: str, num_ranks: int, *, root: int = 0, channels: int = 1, instances: int = 1) -> Program:
    """A chunk without elements carries who has arrived; to reduce it is to have heard of more."""
    p, me = num_ranks, ranks(num_ranks)

    def steps() -> Iterator[Step]:
        yield copy(me, me, 0, source=INPUT)
        for k in range((p - 1).bit_length()):
            yield reduce(me, turn(p, 1 << k), 0)

    return replicate(Program("dissemination", operation, p, 1, steps), channels * instances)


def supports(operation: str, num_ranks: int) -> bool | No:
    """Any number of ranks."""
    return only(OPERATIONS, operation)


def cost(operation: str, num_ranks: int, *, root: int = 0, channels: int = 1, instances: int = 1) -> Cost:
    """Claimed cost, as shares of a chunk that is empty."""
    n = (num_ranks - 1).bit_length()
    return Cost(n, n * channels * instances, Fraction(n), Fraction(n))
