"""Multi-channel ring: several rings at once, each with its share of the data, in alternating directions.

Source: the ring of Patarasuk & Yuan, JPDC 69(2), 2009, over both directions of every link.
Cost: as ring; `channels` times as many messages, each a `channels`-th of the size.
Ranks: any.   [tested]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from paceline.collectives import ring
from paceline.schedule.contract import base_operation
from paceline.schedule.cost import Cost, No, only
from paceline.schedule.program import (
    INPUT,
    OUTPUT,
    SCRATCH,
    Program,
    Step,
    copy,
    ranks,
    reduce,
    together,
    turn,
)

OPERATIONS = ring.OPERATIONS


def build(operation: str, num_ranks: int, *, root: int = 0, channels: int = 2) -> Program:
    """Build `channels` rings in alternating directions.

    Args:
        channels: Number of rings, at least 1; default 2, one for each direction of the links.
    """
    op, p, n = base_operation(operation), num_ranks, channels
    work = SCRATCH if op == "reduce_scatter" else OUTPUT
    me = ranks(p)

    def everywhere(transfer: str, t: int) -> Step:
        """Step t of every ring; ring k moves part k of a chunk by one rank in its direction d, +1 or −1."""
        parts = []
        for k in range(n):
            d = 1 if k % 2 == 0 else -1
            if transfer == "reduce":
                chunk = turn(p, d * (-1 - t)) * n + k
                parts.append(reduce(me, turn(p, d), chunk, source=work, into=work, channel=k))
            else:
                parts.append(copy(me, turn(p, d), turn(p, -d * t) * n + k, channel=k))
        return together(*parts)

    def steps() -> Iterator[Step]:
        if op == "all_gather":
            yield copy(me, me, 0, to=me * n, source=INPUT, count=n)
        else:
            yield copy(me, me, 0, source=INPUT, into=work, count=p * n)
            yield from (everywhere("reduce", t) for t in range(p - 1))
        if op == "reduce_scatter":
            yield copy(me, me, me * n, to=0, source=work, count=n)
        else:
            yield from (everywhere("copy", t) for t in range(p - 1))

    scratch = p * n if work is SCRATCH else 0
    name = "multi_channel_ring"
    return Program(name, operation, p, p * n, steps, num_scratch=scratch, num_channels=n)


def supports(operation: str, num_ranks: int) -> bool | No:
    """Any number of ranks."""
    return only(OPERATIONS, operation)


def cost(operation: str, num_ranks: int, *, root: int = 0, channels: int = 2) -> Cost:
    """As ring, with `channels` times the messages."""
    claim = ring.cost(operation, num_ranks)
    return replace(claim, messages=claim.messages * channels)
