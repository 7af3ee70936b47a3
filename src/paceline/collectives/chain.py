"""Pipelined chain: ranks in a line, the data in segments that follow one another.

Source: textbook; Worringen, PVM/MPI 2003.
Cost: P + segments − 2 steps; every rank but one end sends all the bytes once, so long messages broadcast, or
reduce, at the speed of one link whatever P is.
Ranks: any.   [tested]
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from paceline.schedule.cost import Cost, No, pipelined
from paceline.schedule.program import INPUT, SCRATCH, IntArray, Program, Step, copy, ranks, reduce

OPERATIONS = ("broadcast", "reduce")
ALIASES = ("pipelined_chain",)


def build(operation: str, num_ranks: int, *, root: int = 0, segments: int = 8) -> Program:
    """Segment s leaves the d-th rank from the start of the line at step d + s.

    Args:
        segments: Parts of the buffer that follow one another, at least 1; default 8. More segments suit more
            ranks and longer buffers: the time is (P + segments − 2)(α + Sβ/segments).
    """
    p, m = num_ranks, segments

    def line(t: int) -> tuple[IntArray, IntArray]:
        """Places in the line that send at step t, and the segment that each sends."""
        place = np.arange(max(0, t - m + 1), min(t, p - 2) + 1)
        return place, t - place

    def steps() -> Iterator[Step]:
        if operation == "broadcast":
            yield copy(root, root, 0, source=INPUT, count=m)
            for t in range(p + m - 2):
                place, segment = line(t)
                yield copy((root + place) % p, (root + place + 1) % p, segment)
        else:
            yield copy(ranks(p), ranks(p), 0, source=INPUT, into=SCRATCH, count=m)
            for t in range(p + m - 2):
                place, segment = line(t)
                end = (root - p + 1 + place) % p
                yield reduce(end, (end + 1) % p, segment, source=SCRATCH, into=SCRATCH)
            yield copy(root, root, 0, source=SCRATCH, count=m)

    scratch = m if operation == "reduce" else 0
    return Program("chain", operation, p, m, steps, root, num_scratch=scratch)


def supports(operation: str, num_ranks: int, *, segments: int = 8) -> bool | No:
    """Any number of ranks and any root."""
    return pipelined(OPERATIONS, operation, segments)


def cost(operation: str, num_ranks: int, *, root: int = 0, segments: int = 8) -> Cost:
    """P + segments − 2 steps; the last reduction of each hop cannot overlap a transfer."""
    some = Fraction(int(num_ranks > 1))
    steps = num_ranks + segments - 2 if num_ranks > 1 else 0
    messages = segments * int(some)
    reduced, hops = (some, num_ranks - 1) if operation == "reduce" else (Fraction(0), 0)
    path = Fraction(steps, segments), Fraction(hops, segments)
    return Cost(steps, messages, some, reduced, path_sent=path[0], path_reduced=path[1])
