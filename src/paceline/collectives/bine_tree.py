"""Bine trees: rooted operations over binomial trees whose edges alternate between ahead and behind.

In step s a rank that has the data sends it to the partner that `swing` gives it, the farthest first: about
2^s · 2/3 places away in place of a binomial tree's 2^s. Where ranks of one host, or of one group of hosts,
are neighbours, fewer bytes cross the links between groups. Every subtree is a range of neighbouring ranks.

Source: De Sensi et al., Bine trees, arXiv 2508.17311, SC 2025.
Cost: ⌊lg P⌋ steps, and one more for ranks beyond a power of two; broadcast and reduce move all the bytes over
each edge, gather and scatter only those of the ranks below it.
Ranks: any.   [tested]
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from paceline.collectives.swing import partners
from paceline.schedule import rooted
from paceline.schedule.cost import Cost, No, only
from paceline.schedule.program import IntArray, Program

OPERATIONS = ("broadcast", "reduce", "gather", "scatter")


def build(operation: str, num_ranks: int, *, root: int = 0) -> Program:
    """Build the program for a rooted operation, with any root."""
    p = num_ranks
    return rooted.program(
        "bine_tree", operation, p, root, edges=lambda: edges(p), subtrees=lambda: _subtrees(p)
    )


def _sizes(p: int) -> tuple[int, int, IntArray]:
    """⌊lg P⌋, ranks of the tree, and the others: rank `core + i` hangs on rank i. Relative to the root."""
    rounds = p.bit_length() - 1
    core = 1 << rounds
    return rounds, core, np.arange(core, p, dtype=np.intp)


def edges(p: int) -> list[tuple[IntArray, IntArray]]:
    """For every step of a broadcast: the senders and their receivers, relative to the root."""
    rounds, core, others = _sizes(p)
    found, have = [], np.zeros(1, dtype=np.intp)
    for s in reversed(range(rounds)):
        child = partners(core, s)[have]
        found.append((have, child))
        have = np.concatenate([have, child])
    return [*found, (others - core, others)]


def _subtrees(p: int) -> list[tuple[IntArray, IntArray, IntArray]]:
    """The same edges, with every rank at or below the receiver."""
    rounds, core, others = _sizes(p)
    found = []
    for s, (parent, child) in zip(reversed(range(rounds)), edges(p), strict=False):
        below = child[:, None]
        for t in reversed(range(s)):
            below = np.concatenate([below, partners(core, t)[below]], axis=1)
        below = np.concatenate([below, below + core], axis=1)  # and the ranks that hang on these
        inside = below < p
        which = np.broadcast_to(np.arange(len(child))[:, None], below.shape)[inside]
        found.append((parent[which], child[which], below[inside]))
    return [*found, (others - core, others, others)]


def supports(operation: str, num_ranks: int) -> bool | No:
    """Any number of ranks and any root."""
    return only(OPERATIONS, operation)


def cost(operation: str, num_ranks: int, *, root: int = 0) -> Cost:
    """⌊lg P⌋ steps and one for the others; the messages and bytes are those of the busiest rank."""
    p = num_ranks
    rounds, _, others = _sizes(p)
    fold = int(len(others) > 0)
    n, once = rounds + fold, min(rounds + fold, 1)
    if operation == "broadcast":
        return Cost(n, n, Fraction(n))
    if operation == "reduce":
        return Cost(n, once, Fraction(once), Fraction(n), path_sent=Fraction(n), has_closed_form=not fold)
    if operation == "scatter":
        return Cost(n, n, Fraction(p - 1, p), has_closed_form=not fold)
    most = len(_subtrees(p)[0][0])  # the first receiver of a scatter has half of the tree below it
    return Cost(n, once, Fraction(most, p), path_sent=Fraction(p - 1, p), has_closed_form=not fold)
