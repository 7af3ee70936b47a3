"""Reduction tree: reduce up a binomial tree to one rank, then broadcast the result back down.

Source: Iandola et al., "FireCaffe", CVPR 2016: 2⌈lg P⌉ dependent steps instead of a parameter server's P.
Cost: 2⌈lg P⌉ steps of all the bytes; ⌈lg P⌉ times the bytes sent and reduced by the busiest rank.
Ranks: any.   [tested]
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from paceline.collectives.binomial_tree import edges, reductions_in_a_row, rounds
from paceline.schedule.cost import Cost, No, only
from paceline.schedule.program import INPUT, Program, Step, copy, ranks, reduce

OPERATIONS = ("all_reduce",)
ALIASES = ("firecaffe",)


def build(operation: str, num_ranks: int, *, root: int = 0) -> Program:
    """Binomial reduce to rank `root`, binomial broadcast from it."""
    p = num_ranks

    def steps() -> Iterator[Step]:
        yield copy(ranks(p), ranks(p), 0, source=INPUT)
        for parent, child in reversed(edges(p)):
            yield reduce((child + root) % p, (parent + root) % p, 0)
        for parent, child in edges(p):
            yield copy((parent + root) % p, (child + root) % p, 0)

    return Program("reduction_tree", operation, p, 1, steps)


def supports(operation: str, num_ranks: int) -> bool | No:
    """Any number of ranks."""
    return only(OPERATIONS, operation)


def cost(operation: str, num_ranks: int, *, root: int = 0) -> Cost:
    """⌈lg P⌉ steps up and ⌈lg P⌉ down; the bytes are those of the root."""
    n = rounds(num_ranks)
    waits = Fraction(reductions_in_a_row(num_ranks))
    share, path = Fraction(n), Fraction(2 * n)
    return Cost(2 * n, n, share, share, path_sent=path, path_reduced=waits)
