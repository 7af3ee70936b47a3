"""Flat tree: the root exchanges messages with all other ranks at once.

Source: textbook (the linear algorithms of Open MPI and MPICH). Lowered zero-copy, every rank reads the root's
buffer, or the root reads all of theirs, and nothing is copied twice.
Cost: 1 step of P−1 messages, concurrent on shared memory, serial on one port.
Ranks: any.   [tested]
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from paceline.schedule.cost import Cost, No, only
from paceline.schedule.program import INPUT, SCRATCH, Program, Step, copy, ranks, reduce, together

OPERATIONS = ("broadcast", "reduce", "gather", "scatter")
ALIASES = ("linear",)


def build(operation: str, num_ranks: int, *, root: int = 0) -> Program:
    """Build the program; `reduce` adds up in the order of ranks, starting after the root."""
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
    return Program("flat_tree", operation, p, chunks, steps, root, num_scratch=scratch)


def supports(operation: str, num_ranks: int) -> bool | No:
    """Any number of ranks and any root."""
    return only(OPERATIONS, operation)


def cost(operation: str, num_ranks: int, *, root: int = 0) -> Cost:
    """One step, with the messages of the busiest rank: the root, or any other if the root only receives."""
    others = num_ranks - 1
    some = int(others > 0)
    if operation == "broadcast":
        return Cost(some, others, Fraction(others))
    if operation == "scatter":
        return Cost(some, others, Fraction(others, num_ranks))
    if operation == "gather":
        path = Fraction(others, num_ranks)  # into the root
        return Cost(some, some, Fraction(some, num_ranks), path_sent=path)
    return Cost(some, some, Fraction(some), Fraction(others), path_sent=Fraction(others))
