"""Binomial tree: in each step every rank that has the data sends it to one that has not, or the reverse.

Source: textbook; Thakur, Rabenseifner & Gropp, IJHPCA 19(1), 2005.
Cost: ⌈lg P⌉ steps; broadcast and reduce move all the bytes over each edge, gather and scatter only those of
the ranks below it.
Ranks: any.   [tested]
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from paceline.schedule import rooted
from paceline.schedule.cost import Cost, No, only
from paceline.schedule.program import IntArray, Program

OPERATIONS = ("broadcast", "reduce", "gather", "scatter")
ALIASES = ("binomial",)


def rounds(num_ranks: int) -> int:
    """Return the number of steps, ⌈lg P⌉."""
    return (num_ranks - 1).bit_length()


def build(operation: str, num_ranks: int, *, root: int = 0) -> Program:
    """Build the program for a rooted operation, with any root."""
    p = num_ranks
    return rooted.program(
        "binomial_tree", operation, p, root, edges=lambda: edges(p), subtrees=lambda: _subtrees(p)
    )


def edges(p: int) -> list[tuple[IntArray, IntArray]]:
    """In step k of a broadcast ranks 2^k … 2^(k+1) − 1 receive, each from the rank 2^k below it."""
    children = [np.arange(1 << k, min(2 << k, p), dtype=np.intp) for k in range(rounds(p))]
    return [(child - (1 << k), child) for k, child in enumerate(children)]


def _subtrees(p: int) -> list[tuple[IntArray, IntArray, IntArray]]:
    """The farthest edges first: below a rank that receives are the ranks up to the next that does."""
    found = []
    for k in reversed(range(rounds(p))):
        child = np.arange(1 << k, p, 2 << k, dtype=np.intp)
        below = child[:, None] + np.arange(1 << k)
        inside = below < p
        receiver = np.broadcast_to(child[:, None], below.shape)[inside]
        found.append((receiver - (1 << k), receiver, below[inside]))
    return found


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
