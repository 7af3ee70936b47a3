"""Two-step all-to-all: hosts aggregate first, so that few large messages cross the network.

Rank j of a host collects from all ranks of that host the blocks for the j-th rank of every other host, and
sends them in one message: M−1 large messages per rank instead of P−L small ones.
Source: the two-step all-to-all of MSCCL; hierarchical all-to-all of DeepSpeed-MoE, Rajbhandari et al., 2022.
Cost: 2 steps; with L ranks on each of M hosts, L−1 local messages and M−1 between hosts per rank.
Ranks: any, on any hosts; on a host with few ranks each serves several ranks of a larger one.   [tested]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from paceline.schedule.cost import Cost, No, few_enough, only
from paceline.schedule.hosts import VARIANTS, Hosts, fits, members
from paceline.schedule.program import (
    COPY,
    INPUT,
    OUTPUT,
    SCRATCH,
    Op,
    Program,
    Step,
    copy,
    step_of,
)

__all__ = ["OPERATIONS", "VARIANTS", "build", "cost", "supports"]
OPERATIONS = ("all_to_all", "all_to_all_v")
ALIASES = ("two_step_all_to_all",)


def build(operation: str, num_ranks: int, *, root: int = 0, hosts: Hosts = None) -> Program:
    """Blocks between hosts go through the rank of the sender's host that serves their destination.

    Args:
        hosts: Host of every rank, or the number of hosts, see `schedule.hosts.Hosts`; by default as many
            hosts as ranks per host, as nearly as P allows. Give the real hosts to spare the network.
    """
    p, groups = num_ranks, [g.tolist() for g in members(num_ranks, hosts)]
    most = max(len(g) for g in groups)
    agents = [(g, agent, dst) for g in groups for dst, agent in _agents(g, groups)]
    room = _room(groups)

    def steps() -> Iterator[Step]:
        inside = [Op(COPY, src, INPUT, dst, dst, OUTPUT, src) for g in groups for src in g for dst in g]
        collect = [
            Op(COPY, src, INPUT, dst, agent, SCRATCH, room[agent, dst] * most + i)
            for g, agent, dst in agents
            for i, src in enumerate(g)
        ]
        yield step_of(inside + collect)
        rows = [
            (agent, dst, room[agent, dst] * most + i, src)
            for g, agent, dst in agents
            for i, src in enumerate(g)
        ]
        table = np.array(rows, dtype=np.intp).reshape(-1, 4)
        yield copy(table[:, 0], table[:, 1], table[:, 2], to=table[:, 3], source=SCRATCH)

    scratch = (1 + max(room.values(), default=-1)) * most
    return Program("two_step", operation, p, p, steps, num_scratch=scratch)


def _agents(group: list[int], groups: list[list[int]]) -> Iterator[tuple[int, int]]:
    """Every (destination on another host, agent): the agent is the rank of `group` that serves it."""
    for other in groups:
        if other is not group:
            yield from ((dst, group[j % len(group)]) for j, dst in enumerate(other))


def _room(groups: list[list[int]]) -> dict[tuple[int, int], int]:
    """(agent, destination) → which of its message-sized parts of SCRATCH the agent uses for it."""
    used: Counter[int] = Counter()
    room = {}
    for group in groups:
        for dst, agent in _agents(group, groups):
            room[agent, dst] = used[agent]
            used[agent] += 1
    return room


def supports(operation: str, num_ranks: int, *, hosts: Hosts = None) -> bool | No:
    """Any number of ranks on any hosts, as long as P² transfers fit in memory."""
    return few_enough(num_ranks, num_ranks) and fits(num_ranks, hosts) and only(OPERATIONS, operation)


def cost(operation: str, num_ranks: int, *, root: int = 0, hosts: Hosts = None) -> Cost:
    """One step within hosts and one between them; messages and bytes are those of the busiest rank."""
    p, groups = num_ranks, [g.tolist() for g in members(num_ranks, hosts)]
    messages, sent = [0], [Fraction(0)]
    for g in groups:
        serves = Counter(agent for _, agent in _agents(g, groups))
        for rank in g:
            messages.append(len(g) - 1 + serves[rank])
            local = p - 1 - serves[rank]  # all blocks except its own and those that it serves itself
            sent.append(Fraction(local + serves[rank] * len(g), p))
    steps = int(max(len(g) for g in groups) > 1) + int(len(groups) > 1)
    return Cost(steps, max(messages), max(sent))
