"""Hierarchical all-reduce in four steps: local reduce-scatter, inter-host reduce-scatter, and both gathers.

Source: the four-step all-reduce of two-level clusters; Cho et al., "BlueConnect", SysML 2019.
Cost: 4 steps. With M hosts, the smallest of L and the largest of L' ranks, the busiest rank sends
(L−1)/L + (L'−1)/L + 2(M−1)/(LM) of the bytes, only the last part between hosts.
Ranks: any, on any hosts. L ranks of each host own shards; the others only send and receive them.   [tested]
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from paceline.schedule.cost import Cost, No, only
from paceline.schedule.hosts import VARIANTS, Hosts, fits, members
from paceline.schedule.program import INPUT, Program, Step, copy, ranks, reduce

__all__ = ["OPERATIONS", "VARIANTS", "build", "cost", "supports"]
OPERATIONS = ("all_reduce",)


def build(operation: str, num_ranks: int, *, root: int = 0, hosts: Hosts = None) -> Program:
    """Shard i belongs to the i-th rank of every host; of its M chunks, chunk h belongs to the one on host h.

    Args:
        hosts: Host of every rank, or the number of hosts, see `schedule.hosts.Hosts`; by default as many
            hosts as ranks per host, as nearly as P allows. Give the real hosts to spare the network.
    """
    p, groups = num_ranks, members(num_ranks, hosts)
    m, shards = len(groups), min(len(g) for g in groups)
    owners = np.array([g[:shards] for g in groups])  # shape (M, L)

    rank = np.concatenate([np.repeat(g, shards) for g in groups])
    owner = np.concatenate([np.tile(g[:shards], len(g)) for g in groups])
    shard = np.tile(ranks(shards), p)
    rank, owner, shard = (column[rank != owner] for column in (rank, owner, shard))
    a, b, i = (index.ravel() for index in np.indices((m, m, shards)))
    a, b, i = (index[a != b] for index in (a, b, i))
    src, dst, chunk = owners[a, i], owners[b, i], i * m + b

    def steps() -> Iterator[Step]:
        yield copy(ranks(p), ranks(p), 0, source=INPUT, count=shards * m)
        yield reduce(rank, owner, shard * m, count=m)
        yield reduce(src, dst, chunk)
        yield copy(dst, src, chunk)
        yield copy(owner, rank, shard * m, count=m)

    return Program("hierarchical", operation, p, shards * m, steps)


def supports(operation: str, num_ranks: int, *, hosts: Hosts = None) -> bool | No:
    """Any number of ranks on any hosts."""
    return fits(num_ranks, hosts) and only(OPERATIONS, operation)


def cost(operation: str, num_ranks: int, *, root: int = 0, hosts: Hosts = None) -> Cost:
    """Two steps within hosts that have more than one rank, two between hosts if there is more than one."""
    groups = members(num_ranks, hosts)
    m, few, most = len(groups), min(len(g) for g in groups), max(len(g) for g in groups)
    steps = 2 * (most > 1) + 2 * (m > 1)
    messages = (few - 1) + (most - 1) + 2 * (m - 1)
    inter = Fraction(m - 1, m * few)
    sent = Fraction(few - 1 + most - 1, few) + 2 * inter
    return Cost(steps, messages, sent, Fraction(most - 1, few) + inter)
