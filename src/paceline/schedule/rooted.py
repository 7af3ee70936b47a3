"""Rooted operations over a tree of ranks, which an algorithm gives by its edges."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from paceline.schedule.program import INPUT, OUTPUT, SCRATCH, IntArray, Program, Step, copy, ranks, reduce

Edges = Callable[[], Sequence[tuple[IntArray, IntArray]]]
"""For every step of a broadcast: the senders and their receivers, relative to the root."""
Subtrees = Callable[[], Sequence[tuple[IntArray, IntArray, IntArray]]]
"""For every step of a scatter: sender, receiver, and a rank at or below the receiver; one row for each such
rank, all relative to the root."""


def program(
    algorithm: str, operation: str, num_ranks: int, root: int, *, edges: Edges, subtrees: Subtrees
) -> Program:
    """The program of a rooted operation; reduce and gather go the steps of broadcast and scatter backwards.

    Args:
        algorithm: Its name.
        operation: broadcast, reduce, gather or scatter.
        num_ranks: P.
        root: 0 … P−1.
        edges: Of broadcast and reduce, which move the whole buffer.
        subtrees: Of gather and scatter, which move the blocks of the ranks below.
    """
    p = num_ranks
    chunks = p if operation in ("gather", "scatter") else 1
    scratch = 0 if operation == "broadcast" else chunks

    def steps() -> Iterator[Step]:
        if operation == "broadcast":
            return _broadcast(p, root, edges)
        if operation == "reduce":
            return _reduce(p, root, edges)
        return (_gather if operation == "gather" else _scatter)(p, root, subtrees)

    return Program(algorithm, operation, p, chunks, steps, root, num_scratch=scratch)


def _broadcast(p: int, root: int, edges: Edges) -> Iterator[Step]:
    yield copy(root, root, 0, source=INPUT)
    for parent, child in edges():
        yield copy((parent + root) % p, (child + root) % p, 0)


def _reduce(p: int, root: int, edges: Edges) -> Iterator[Step]:
    yield copy(ranks(p), ranks(p), 0, source=INPUT, into=SCRATCH)
    for parent, child in reversed(edges()):
        yield reduce((child + root) % p, (parent + root) % p, 0, source=SCRATCH, into=SCRATCH)
    yield copy(root, root, 0, source=SCRATCH)


def _gather(p: int, root: int, subtrees: Subtrees) -> Iterator[Step]:
    me = ranks(p)
    yield copy(me, me, 0, to=me, source=INPUT, into=np.where(me == root, OUTPUT, SCRATCH))
    for parent, child, block in reversed(subtrees()):
        into = np.where(parent == 0, OUTPUT, SCRATCH)
        src, dst = (child + root) % p, (parent + root) % p
        yield copy(src, dst, (block + root) % p, source=SCRATCH, into=into)


def _scatter(p: int, root: int, subtrees: Subtrees) -> Iterator[Step]:
    me = ranks(p)
    for parent, child, block in subtrees():
        source = np.where(parent == 0, INPUT, SCRATCH)
        src, dst = (parent + root) % p, (child + root) % p
        yield copy(src, dst, (block + root) % p, source=source, into=SCRATCH)
    yield copy(me, me, me, to=0, source=np.where(me == root, INPUT, SCRATCH))
