"""Double binary tree: two trees at once, each for half of the data, pipelined in segments.

Inner ranks of one tree are leaves of the other, except the roots and, when P is odd, one more rank. Nearly
every rank therefore sends and receives about twice the bytes in all.
Source: Sanders, Speck & Träff, Parallel Computing 35(12), 2009; all-reduce as in NCCL 2.4.
Cost, with D the depth of a tree (about lg P) and m segments: all_reduce 2D + m − 1 steps; reduce and
broadcast D + m − 1 with the root above both trees of the other ranks.
Ranks: any.   [tested]
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from paceline.schedule.cost import Cost, No, pipelined
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
    together,
)

OPERATIONS = ("all_reduce", "reduce", "broadcast")


def tree(p: int) -> tuple[IntArray, IntArray]:
    """In-order binary tree of ranks 0 … p−1 with odd ranks as leaves: parents (−1 at root 0) and depths."""
    parent = np.full(p, -1, dtype=np.intp)
    for r in range(1, p):
        bit = r & -r
        up = (r ^ bit) | (bit << 1)
        parent[r] = up if up < p else r ^ bit
    depth = np.zeros(p, dtype=np.intp)
    at = parent.copy()
    while (at >= 0).any():
        depth[at >= 0] += 1
        at = np.where(at >= 0, parent[at], -1)
    return parent, depth


def trees(operation: str, p: int, root: int) -> list[tuple[IntArray, IntArray]]:
    """Both trees: (parent, depth) of every rank. The second is the first, mirrored or rotated by one rank."""
    n = p if operation == "all_reduce" else p - 1  # ranks in a tree: the root of a rooted one is above both
    if n < 1:
        return [(np.full(p, -1), np.zeros(p, dtype=np.intp))] * 2
    parent, depth = tree(n)
    position = ranks(n)
    real = position if n == p else (position + 1 + root) % p
    found = []
    for place in (position, n - 1 - position if n % 2 == 0 else (position + 1) % n):
        up, level = np.full(p, -1, dtype=np.intp), np.zeros(p, dtype=np.intp)
        up[real[place]] = np.where(parent >= 0, real[place[parent]], root if n < p else -1)
        level[real[place]] = depth + (n < p)
        found.append((up, level))
    return found


def build(operation: str, num_ranks: int, *, root: int = 0, segments: int = 4) -> Program:
    """Two pipelined trees; tree k has its own channel and the chunks k·segments … (k + 1)·segments − 1.

    Args:
        segments: Parts of each half of the buffer that follow one another, at least 1; default 4. More
            segments keep all levels of the tree busy for long buffers, at a latency for each.
    """
    p, m = num_ranks, segments
    both = trees(operation, p, root)
    depth = max(int(level.max()) for _, level in both)
    work = SCRATCH if operation == "reduce" else OUTPUT

    def transfers(t: int, climbs: bool, first: int) -> Step:
        """Step t: segment s passes depth d at step first + s + D − d (up) or first + s + d − 1 (down)."""
        parts = []
        for k, (parent, level) in enumerate(both):
            segment = t - first - (depth - level if climbs else level - 1)
            busy = np.flatnonzero((parent >= 0) & (segment >= 0) & (segment < m))
            chunk, up = k * m + segment[busy], parent[busy]
            if climbs:
                parts.append(reduce(busy, up, chunk, source=work, into=work, channel=k))
            else:
                parts.append(copy(up, busy, chunk, channel=k))
        return together(*parts)

    def steps() -> Iterator[Step]:
        loaders = np.array([root]) if operation == "broadcast" else ranks(p)
        yield copy(loaders, loaders, 0, source=INPUT, into=work, count=2 * m)
        if operation != "all_reduce":
            yield from (transfers(t, operation == "reduce", 0) for t in range(depth + m - 1))
        else:
            yield from (
                together(transfers(t, True, 0), transfers(t, False, depth)) for t in range(2 * depth + m - 1)
            )
        if operation == "reduce":
            yield copy(root, root, 0, source=work, count=2 * m)

    scratch = 2 * m if work is SCRATCH else 0
    return Program(
        "double_binary_tree", operation, p, 2 * m, steps, root, num_scratch=scratch, num_channels=2
    )


def supports(operation: str, num_ranks: int, *, segments: int = 4) -> bool | No:
    """Any number of ranks."""
    return pipelined(OPERATIONS, operation, segments)


def cost(operation: str, num_ranks: int, *, root: int = 0, segments: int = 4) -> Cost:
    """Half of the bytes over every edge of a tree, once per direction."""
    p = num_ranks
    if p == 1:
        return Cost(0, 0, Fraction(0))
    both = trees(operation, p, root)
    depth = max(int(level.max()) for _, level in both)
    children = sum(np.bincount(parent[parent >= 0], minlength=p) for parent, _ in both)
    parents = sum((parent >= 0).astype(np.intp) for parent, _ in both)
    climbs, falls = operation != "broadcast", operation != "reduce"
    edges = int(np.max(parents * climbs + children * falls))
    steps = (2 if operation == "all_reduce" else 1) * depth + segments - 1
    received = Fraction(int(np.max(children)), 2) if climbs else Fraction(0)
    return Cost(steps, edges * segments, Fraction(edges, 2), received, has_closed_form=False)
