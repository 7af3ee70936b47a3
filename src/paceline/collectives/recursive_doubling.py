"""Recursive doubling: every rank exchanges the whole buffer with a partner at distance 1, 2, 4 …

Source: Thakur, Rabenseifner & Gropp, IJHPCA 19(1), 2005. Gloo calls it pairwise exchange.
Cost: lg P steps of all the bytes for a power of two. Otherwise 2^⌊lg P⌋ ranks take part; each of the others
sends to its neighbour before and receives the result after: ⌊lg P⌋ + 2 steps.
Ranks: any.   [tested]
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from paceline.schedule.cost import Cost, No, only
from paceline.schedule.program import INPUT, Program, Step, copy, ranks, reduce

OPERATIONS = ("all_reduce",)
ALIASES = ("pairwise_exchange",)


def build(operation: str, num_ranks: int, *, root: int = 0) -> Program:
    """Build the program, of one chunk; ranks beyond a power of two are folded into their neighbours."""
    p, rounds = num_ranks, num_ranks.bit_length() - 1
    core = 1 << rounds  # ranks that take part
    extra = p - core  # of the first 2·extra ranks the even ones are folded into their neighbours

    def steps() -> Iterator[Step]:
        v = ranks(core)
        real = np.where(v < extra, 2 * v + 1, v + extra)
        folded = 2 * ranks(core)[:extra]
        yield copy(ranks(p), ranks(p), 0, source=INPUT)
        yield reduce(folded, folded + 1, 0)
        for k in range(rounds):
            yield reduce(real, real[v ^ (1 << k)], 0)
        yield copy(folded + 1, folded, 0)

    return Program("recursive_doubling", operation, p, 1, steps)


def supports(operation: str, num_ranks: int) -> bool | No:
    """Any number of ranks."""
    return only(OPERATIONS, operation)


def cost(operation: str, num_ranks: int, *, root: int = 0) -> Cost:
    """⌊lg P⌋ steps of all the bytes, and two for folding."""
    rounds = num_ranks.bit_length() - 1
    is_folded = num_ranks != 1 << rounds
    sends = rounds + is_folded
    steps = rounds + 2 * is_folded
    share = Fraction(sends)  # folding overlaps reductions and transfers in a way that has no closed form
    return Cost(steps, sends, share, share, has_closed_form=not is_folded)
