"""Ring: partial sums travel round the ring once, finished chunks once more.

Source: Patarasuk & Yuan, JPDC 69(2), 2009.
Cost: all_reduce 2(P−1) steps, 2(P−1)/P of the bytes sent per rank; reduce_scatter and all_gather half.
Ranks: any.   [tested]
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from paceline.schedule.contract import base_operation
from paceline.schedule.cost import Cost, No, only
from paceline.schedule.program import (
    INPUT,
    OUTPUT,
    SCRATCH,
    Program,
    Step,
    copy,
    ranks,
    reduce,
    turn,
)

OPERATIONS = ("all_reduce", "reduce_scatter", "all_gather", "reduce_scatter_v", "all_gather_v")


def build(operation: str, num_ranks: int, *, root: int = 0) -> Program:
    """Build the program for any number of ranks."""
    op, p = base_operation(operation), num_ranks
    work = SCRATCH if op == "reduce_scatter" else OUTPUT

    def steps() -> Iterator[Step]:
        me, right = ranks(p), turn(p, 1)
        if op == "all_gather":
            yield copy(me, me, 0, to=me, source=INPUT)
        else:
            yield copy(me, me, 0, source=INPUT, into=work, count=p)
            for t in range(p - 1):
                yield reduce(me, right, turn(p, -1 - t), source=work, into=work)
        if op == "reduce_scatter":
            yield copy(me, me, me, to=0, source=work)
        else:
            for t in range(p - 1):
                yield copy(me, right, turn(p, -t))

    scratch = p if work is SCRATCH else 0
    return Program("ring", operation, p, p, steps, num_scratch=scratch)


def supports(operation: str, num_ranks: int) -> bool | No:
    """Any number of ranks."""
    return only(OPERATIONS, operation)


def cost(operation: str, num_ranks: int, *, root: int = 0) -> Cost:
    """P − 1 steps of 1/P of the bytes for each time round the ring."""
    p = num_ranks
    rounds = 2 if operation == "all_reduce" else 1
    reduced = Fraction(0) if "gather" in operation else Fraction(p - 1, p)
    steps = rounds * (p - 1)
    return Cost(steps, steps, Fraction(steps, p), reduced)
