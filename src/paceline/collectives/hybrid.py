"""Hybrid all-reduce: ring inside hosts, halving-doubling between them on 1/L of the data each.

Source: the ring and halving-doubling of their files, composed per level as in the 2-D schemes of Mikami et
al., arXiv:1811.05233, and Ying et al., arXiv:1811.06992.
Cost: 2(L−1) local steps with 2(L−1)/L of the bytes, and halving-doubling of M hosts on 1/L of the bytes.
Ranks: L on each of M hosts, any L and M.   [tested]
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from paceline.collectives import halving_doubling, ring
from paceline.schedule.cost import Cost, No, only
from paceline.schedule.hosts import VARIANTS, Hosts, embed, fits, members
from paceline.schedule.program import INPUT, Program, Step, copy, ranks

__all__ = ["OPERATIONS", "VARIANTS", "build", "cost", "supports"]
OPERATIONS = ("all_reduce",)


def build(operation: str, num_ranks: int, *, root: int = 0, hosts: Hosts = None) -> Program:
    """Local ring reduce-scatter, inter-host all-reduce of every shard, local ring all-gather.

    Args:
        hosts: Host of every rank, or the number of hosts, see `schedule.hosts.Hosts`; by default as many
            hosts as ranks per host, as nearly as P allows. Give the real hosts to spare the network.
    """
    p = num_ranks
    local = np.array(members(p, hosts))  # shape (M, L)
    m, shards = local.shape
    inside, across = ring.build("all_reduce", shards), halving_doubling.build("all_reduce", m)
    width = across.num_chunks  # chunks of one shard

    def steps() -> Iterator[Step]:
        yield copy(ranks(p), ranks(p), 0, source=INPUT, count=shards * width)
        circle = [s for s in inside.steps() if not s.is_local]
        here = np.zeros(m, dtype=np.intp)  # on every host the shards start at chunk 0
        yield from (embed(s, local, chunk=here, scale=width) for s in circle[: shards - 1])
        own = ranks(shards) * width
        yield from (embed(s, local.T, chunk=own) for s in across.steps() if not s.is_local)
        yield from (embed(s, local, chunk=here, scale=width) for s in circle[shards - 1 :])

    return Program("hybrid", operation, p, shards * width, steps)


def supports(operation: str, num_ranks: int, *, hosts: Hosts = None) -> bool | No:
    """The same number of ranks on every host."""
    if not (answer := fits(num_ranks, hosts)):
        return answer
    sizes = {len(g) for g in members(num_ranks, hosts)}
    if len(sizes) > 1:
        return No(
            f"the same number of ranks on every host expected, got {sorted(sizes)}; hierarchical takes any"
        )
    return only(OPERATIONS, operation)


def cost(operation: str, num_ranks: int, *, root: int = 0, hosts: Hosts = None) -> Cost:
    """A local ring, and halving-doubling between hosts on 1/L of the bytes."""
    groups = members(num_ranks, hosts)
    shards = len(groups[0])
    a, b = ring.cost(operation, shards), halving_doubling.cost(operation, len(groups))
    messages = a.messages + b.messages
    sent, reduced = a.sent + b.sent / shards, a.reduced + b.reduced / shards
    path = a.sent + b.path()[0] / shards
    return Cost(a.steps + b.steps, messages, sent, reduced, path_sent=path)
