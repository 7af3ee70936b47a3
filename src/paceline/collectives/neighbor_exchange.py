"""Neighbour exchange: ranks swap the newest blocks with their left and their right neighbour in turn.

Source: Chen et al., "Performance evaluation of allgather algorithms on terascale Linux cluster", 2005.
Cost: P/2 steps, (P−1)/P of the bytes sent per rank, neighbours only.
Ranks: even (and one).   [tested]
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from paceline.schedule.cost import Cost, No, only
from paceline.schedule.program import INPUT, Program, Step, copy, ranks

OPERATIONS = ("all_gather", "all_gather_v")
ALIASES = ("neighbour_exchange",)


def build(operation: str, num_ranks: int, *, root: int = 0) -> Program:
    """Build the all-gather for an even number of ranks, or one."""
    p, me = num_ranks, ranks(num_ranks)

    def steps() -> Iterator[Step]:
        yield copy(me, me, 0, to=me, source=INPUT)
        if p == 1:
            return
        right_first = np.where(me % 2 == 0, 1, -1)
        peer = (me + right_first) % p
        yield copy(me, peer, me)
        pair = me // 2  # the two blocks that a rank received last
        for t in range(1, p // 2):
            peer = (me + right_first * (1 if t % 2 == 0 else -1)) % p
            yield copy(me, peer, 2 * pair, count=2)
            pair = pair[peer]

    return Program("neighbor_exchange", operation, p, p, steps)


def supports(operation: str, num_ranks: int) -> bool | No:
    """Even numbers of ranks."""
    if num_ranks % 2 and num_ranks > 1:
        return No(f"an even number of ranks expected, got {num_ranks}")
    return only(OPERATIONS, operation)


def cost(operation: str, num_ranks: int, *, root: int = 0) -> Cost:
    """P/2 steps of one message per rank."""
    p = num_ranks
    return Cost(p // 2, p // 2, Fraction(p - 1, p))
