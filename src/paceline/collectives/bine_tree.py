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

from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from paceline.collectives.swing import partners
from paceline.schedule.cost import Cost, No, only
from paceline.schedule.program import INPUT, OUTPUT, SCRATCH, IntArray, Program, Step, copy, ranks, reduce

OPERATIONS = ("broadcast", "reduce", "gather", "scatter")


def build(operation: str, num_ranks: int, *, root: int = 0) -> Program:
    """Build the program for a rooted operation, with any root."""
    p = num_ranks
    chunks = p if operation in ("gather", "scatter") else 1
    make = {"broadcast": _broadcast, "reduce": _reduce, "gather": _gather, "scatter": _scatter}[operation]
    scratch = 0 if operation == "broadcast" else chunks

    def steps() -> Iterator[Step]:
        return make(p, root)

    return Program("bine_tree", operation, p, chunks, steps, root, num_scratch=scratch)


def _sizes(p: int) -> tuple[int, int, IntArray]:
    """⌊lg P⌋, ranks of the tree, and the others: rank `core + i` hangs on rank i. Relative to the root."""
    rounds = p.bit_length() - 1
    core = 1 << rounds
    return rounds, core, np.arange(core, p, dtype=np.intp)


def edges(p: int) -> list[tuple[int, IntArray, IntArray]]:
    """For every step of a broadcast: its number s, the senders and their receivers, relative to the root."""
    rounds, core, _ = _sizes(p)
    found, have = [], np.zeros(1, dtype=np.intp)
    for s in reversed(range(rounds)):
        child = partners(core, s)[have]
        found.append((s, have, child))
        have = np.concatenate([have, child])
    return found


def _below(p: int, s: int, child: IntArray) -> tuple[IntArray, IntArray]:
    """Every (position in `child`, rank below it) of those that receive in step s, themselves included."""
    _, core, _ = _sizes(p)
    under = child[:, None]
    for t in reversed(range(s)):
        under = np.concatenate([under, partners(core, t)[under]], axis=1)
    under = np.concatenate([under, under + core], axis=1)  # and the ranks that hang on these
    inside = under < p
    which = np.broadcast_to(np.arange(len(child))[:, None], under.shape)
    return which[inside], under[inside]


def _broadcast(p: int, root: int) -> Iterator[Step]:
    _, core, others = _sizes(p)
    yield copy(root, root, 0, source=INPUT)
    for _, parent, child in edges(p):
        yield copy((parent + root) % p, (child + root) % p, 0)
    yield copy((others - core + root) % p, (others + root) % p, 0)


def _reduce(p: int, root: int) -> Iterator[Step]:
    _, core, others = _sizes(p)
    yield copy(ranks(p), ranks(p), 0, source=INPUT, into=SCRATCH)
    yield reduce((others + root) % p, (others - core + root) % p, 0, source=SCRATCH, into=SCRATCH)
    for _, parent, child in reversed(edges(p)):
        yield reduce((child + root) % p, (parent + root) % p, 0, source=SCRATCH, into=SCRATCH)
    yield copy(root, root, 0, source=SCRATCH)


def _gather(p: int, root: int) -> Iterator[Step]:
    me = ranks(p)
    _, core, others = _sizes(p)
    yield copy(me, me, 0, to=me, source=INPUT, into=np.where(me == root, OUTPUT, SCRATCH))
    into = np.where(others == core, OUTPUT, SCRATCH)  # the first hangs on the root
    yield copy(
        (others + root) % p, (others - core + root) % p, (others + root) % p, source=SCRATCH, into=into
    )
    for s, parent, child in reversed(edges(p)):
        which, block = _below(p, s, child)
        into = np.where(parent[which] == 0, OUTPUT, SCRATCH)
        src, dst = (child[which] + root) % p, (parent[which] + root) % p
        yield copy(src, dst, (block + root) % p, source=SCRATCH, into=into)


def _scatter(p: int, root: int) -> Iterator[Step]:
    me = ranks(p)
    _, core, others = _sizes(p)
    for s, parent, child in edges(p):
        which, block = _below(p, s, child)
        source = np.where(parent[which] == 0, INPUT, SCRATCH)
        src, dst = (parent[which] + root) % p, (child[which] + root) % p
        yield copy(src, dst, (block + root) % p, source=source, into=SCRATCH)
    source = np.where(others == core, INPUT, SCRATCH)
    yield copy(
        (others - core + root) % p, (others + root) % p, (others + root) % p, source=source, into=SCRATCH
    )
    yield copy(me, me, me, to=0, source=np.where(me == root, INPUT, SCRATCH))


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
    most = int(fold)
    if rounds:  # the first receiver of a broadcast has half of the tree below it
        s, _, child = edges(p)[0]
        most = len(_below(p, s, child)[0])
    return Cost(n, once, Fraction(most, p), path_sent=Fraction(p - 1, p), has_closed_form=not fold)
