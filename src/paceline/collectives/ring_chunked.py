"""Chunked ring: the ring on segments that follow one another, so that reducing overlaps transferring.

Source: Gloo's ring_chunked; the pipelining of Patarasuk & Yuan, JPDC 69(2), 2009.
Cost: 2(P−1)·segments steps of 1/(P·segments) of the bytes each; 2(P−1)/P of the bytes sent per rank.
Ranks: any.   [tested]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction

from paceline.collectives import ring
from paceline.schedule.cost import Cost, No, pipelined
from paceline.schedule.program import Program, Step

OPERATIONS = ring.OPERATIONS
ALIASES = ("chunked_ring",)


def build(operation: str, num_ranks: int, *, root: int = 0, segments: int = 2) -> Program:
    """Every step of the ring becomes `segments` steps, one for each part of its chunk.

    Args:
        segments: Parts of every chunk, at least 1; default 2: enough to overlap reductions with
            transfers. More cost more latencies.
    """
    whole = ring.build(operation, num_ranks)

    def steps() -> Iterator[Step]:
        for s in whole.steps():
            src, dst, count = s.src_chunk * segments, s.dst_chunk * segments, s.count * segments
            if s.is_local:
                yield replace(s, src_chunk=src, dst_chunk=dst, count=count)
            else:
                yield from (replace(s, src_chunk=src + i, dst_chunk=dst + i) for i in range(segments))

    return replace(
        whole,
        algorithm="ring_chunked",
        num_chunks=whole.num_chunks * segments,
        num_scratch=whole.num_scratch * segments,
        make_steps=steps,
    )


def supports(operation: str, num_ranks: int, *, segments: int = 2) -> bool | No:
    """Any number of ranks."""
    return pipelined(OPERATIONS, operation, segments)


def cost(operation: str, num_ranks: int, *, root: int = 0, segments: int = 2) -> Cost:
    """As ring, with `segments` times the steps; reductions overlap the transfer of the next segment."""
    c = ring.cost(operation, num_ranks)
    exposed = c.reduced  # reductions that do not overlap the transfer of another segment
    if segments > 1:
        last = min(c.reduced, Fraction(1, num_ranks * segments))
        exposed = last if "scatter" in operation else Fraction(0)
    return Cost(c.steps * segments, c.messages * segments, c.sent, c.reduced, path_reduced=exposed)
