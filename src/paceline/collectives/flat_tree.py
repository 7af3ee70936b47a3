"""Flat tree: the root talks to everyone at once.

Source: textbook (the linear algorithms of Open MPI and MPICH); on shared memory with zero-copy reads every
rank reads the root's buffer, or the root everyone's, and nothing is copied twice.
Cost: 1 step of P−1 messages, concurrent on shared memory, serial on one port.
Ranks: any.   [tested]
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from paceline.schedule.cost import Cost, No, only
from paceline.schedule.program import INPUT, SCRATCH, Program, Step, copy, ranks, reduce, replicate, together

OPERATIONS = ("broadcast", "reduce", "gather", "scatter")
ALIASES = ("linear",)


def build(operation: str, num_ranks: int, *, root: int = 0, channels: int = 1, instances: int = 1) -> Program:
    """Flat tree; `reduce` adds up in the order of ranks, starting after the root."""
    p, me = num_ranks, ranks(num_ranks)
    others = (me[1:] + root) % p

    def steps() -> Iterator[Step]:
        if operation == "broadcast":
            yield together(copy(root, root, 0, source=INPUT), copy(root, others, 0, source=INPUT))
        elif operation == "gather":
            yield copy(me, root, 0, to=me, source=INPUT)
        elif operation == "scatter":
            yield copy(root, me, me, to=0, source=INPUT)
        else:
            yield copy(root, root, 0, source=INPUT, into=SCRATCH)
            yield reduce(others, root, 0, source=INPUT, into=SCRATCH)
            yield copy(root, root, 0, source=SCRATCH)

    chunks = p if operation in ("gather", "scatter") else 1
    scratch = chunks if operation == "reduce" else 0
    program = Program("flat_tree", operation, p, chunks, steps, root, num_scratch=scratch)
    return replicate(program, channels * instances)


def supports(operation: str, num_ranks: int) -> bool | No:
    """Any number of ranks and any root."""
    return only(OPERATIONS, operation)


def cost(operation: str, num_ranks: int, *, root: int = 0, channels: int = 1, instances: int = 1) -> Cost:
    """Claimed cost, of the busiest rank: the root, or any other where the root only listens."""
    others, copies = num_ranks - 1, channels * instances
    some = int(others > 0)
    if operation == "broadcast":
        return Cost(some, others * copies, Fraction(others))
    if operation == "scatter":
        return Cost(some, others * copies, Fraction(others, num_ranks))
    if operation == "gather":
        path = Fraction(others, num_ranks)  # into the root
        return Cost(some, some * copies, Fraction(some, num_ranks), path_sent=path)
    return Cost(some, some * copies, Fraction(some), Fraction(others), path_sent=Fraction(others))
