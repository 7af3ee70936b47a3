"""Binomial tree: in each step every rank that has the data sends it to one that has not, or the reverse.

Source: textbook; Thakur, Rabenseifner & Gropp, IJHPCA 19(1), 2005.
Cost: ⌈lg P⌉ steps; broadcast and reduce move all the bytes over each edge, gather and scatter only those of
the ranks below it.
Ranks: any.   [tested]
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from paceline.schedule.cost import Cost, No, only
from paceline.schedule.program import (
    INPUT,
    OUTPUT,
    SCRATCH,
    IntArray,
    Program,
    Step,
    copy,
    ranks,
    reduce,
)

OPERATIONS = ("broadcast", "reduce", "gather", "scatter")
ALIASES = ("binomial",)


def rounds(num_ranks: int) -> int:
    """Return the number of steps, ⌈lg P⌉."""
    return (num_ranks - 1).bit_length()


def edges(num_ranks: int, k: int) -> IntArray:
    """Receivers of round k of a broadcast, relative to the root: ranks 2^k … 2^(k+1) − 1.

    Each receives from the rank 2^k below it.
    """
    return np.arange(1 << k, min(2 << k, num_ranks), dtype=np.intp)


def build(operation: str, num_ranks: int, *, root: int = 0) -> Program:
    """Build the program for a rooted operation, with any root."""
    p = num_ranks
    chunks = p if operation in ("gather", "scatter") else 1
    make = {"broadcast": _broadcast, "reduce": _reduce, "gather": _gather, "scatter": _scatter}[operation]
    scratch = 0 if operation == "broadcast" else chunks

    def steps() -> Iterator[Step]:
        return make(p, root)

    return Program("binomial_tree", operation, p, chunks, steps, root, num_scratch=scratch)


def _broadcast(p: int, root: int) -> Iterator[Step]:
    yield copy(root, root, 0, source=INPUT)
    for k in range(rounds(p)):
        child = edges(p, k)
        yield copy((child - (1 << k) + root) % p, (child + root) % p, 0)


def _reduce(p: int, root: int) -> Iterator[Step]:
    yield copy(ranks(p), ranks(p), 0, source=INPUT, into=SCRATCH)
    for k in reversed(range(rounds(p))):
        child = edges(p, k)
        parent = (child - (1 << k) + root) % p
        yield reduce((child + root) % p, parent, 0, source=SCRATCH, into=SCRATCH)
    yield copy(root, root, 0, source=SCRATCH)


def _subtrees(p: int, k: int) -> tuple[IntArray, IntArray]:
    """Every (child, rank of its subtree) of round k, relative to the root; both shape (n,)."""
    child = np.arange(1 << k, p, 2 << k, dtype=np.intp)
    below = child[:, None] + np.arange(1 << k)
    inside = below < p
    return np.broadcast_to(child[:, None], below.shape)[inside], below[inside]


def _gather(p: int, root: int) -> Iterator[Step]:
    me = ranks(p)
    yield copy(me, me, 0, to=me, source=INPUT, into=np.where(me == root, OUTPUT, SCRATCH))
    for k in range(rounds(p)):
        child, block = _subtrees(p, k)
        parent = (child - (1 << k) + root) % p
        into = np.where(parent == root, OUTPUT, SCRATCH)
        yield copy((child + root) % p, parent, (block + root) % p, source=SCRATCH, into=into)


def _scatter(p: int, root: int) -> Iterator[Step]:
    me = ranks(p)
    for k in reversed(range(rounds(p))):
        child, block = _subtrees(p, k)
        parent = (child - (1 << k) + root) % p
        source = np.where(parent == root, INPUT, SCRATCH)
        yield copy(parent, (child + root) % p, (block + root) % p, source=source, into=SCRATCH)
    yield copy(me, me, me, to=0, source=np.where(me == root, INPUT, SCRATCH))


def supports(operation: str, num_ranks: int) -> bool | No:
    """Any number of ranks and any root."""
    return only(OPERATIONS, operation)


def cost(operation: str, num_ranks: int, *, root: int = 0) -> Cost:
    """⌈lg P⌉ steps; the messages and bytes are those of the busiest rank."""
    p, n = num_ranks, rounds(num_ranks)
    if operation == "broadcast":
        return Cost(n, n, Fraction(n))
    if operation == "reduce":
        once, waits = Fraction(min(n, 1)), Fraction(reductions_in_a_row(p))
        return Cost(n, min(n, 1), once, Fraction(n), path_sent=Fraction(n), path_reduced=waits)
    if operation == "scatter":
        return Cost(n, n, Fraction(p - 1, p))
    # In round k rank 2^k (relative to the root) sends its whole subtree to the root.
    most = max((min(1 << k, p - (1 << k)) for k in range(n)), default=0)
    return Cost(n, min(n, 1), Fraction(most, p), path_sent=Fraction(p - 1, p))


def reductions_in_a_row(p: int) -> int:
    """Return how many reductions of a reduce to one rank cannot overlap transfers.

    The longest chain starts at a rank r that receives in the first step (r < P − 2^(⌈lg P⌉ − 1)). A reduction
    follows there and at each rank that its sum passes afterwards, one for each bit set in r; the last of them
    is the root.
    """
    return (p - (1 << (rounds(p) - 1))).bit_length() if p > 1 else 0
