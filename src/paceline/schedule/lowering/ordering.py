"""Dependencies of a lowered program: found from what instructions touch, then reduced."""

from __future__ import annotations

from collections import defaultdict

from paceline.schedule.lowering.tidy import Micro

Conflict = tuple[int, int]
"""(instruction to depend on, instruction that must have happened).

They differ for a reclaim only: depending on it means that the peer's read has happened."""


def order(micros: list[Micro]) -> tuple[list[Micro], list[list[int]]]:
    """Return the instructions without needless reclaims, and the dependencies of each.

    Dependencies are positions in the list (same rank, sorted): only those that lanes, messages,
    acknowledgements and other dependencies do not imply. A reclaim is needless if no write depends on it and
    it is not the last of its connection: a later message then shows that the peer has read.
    """
    position = {id(m): i for i, m in enumerate(micros)}
    conflicts = _conflicts(micros, position)
    dependencies = _reduce(micros, position, conflicts, set())
    reclaims = {i: (m.rank, m.send_peer, m.channel) for i, m in enumerate(micros) if m.verb == "reclaim"}
    needed = set({connection: i for i, connection in reclaims.items()}.values())
    needed.update(d for mine in dependencies for d in mine if d in reclaims)
    if needed == reclaims.keys():
        return micros, dependencies
    while True:
        idle = reclaims.keys() - needed
        dependencies = _reduce(micros, position, conflicts, idle)
        missed = {d for mine in dependencies for d in mine} & idle
        if not missed:
            break
        needed |= missed
    new = {old: i for i, old in enumerate(k for k in range(len(micros)) if k not in idle)}
    kept = [[new[d] for d in mine] for k, mine in enumerate(dependencies) if k not in idle]
    return [m for k, m in enumerate(micros) if k not in idle], kept


def _reduce(
    micros: list[Micro], position: dict[int, int], conflicts: list[set[Conflict]], idle: set[int]
) -> list[list[int]]:
    """Return the dependencies of every instruction; those in `idle` order nothing by themselves."""
    before: list[int] = []  # bit set of everything that happens before an instruction
    lane_last: dict[tuple[int, int], int] = {}
    kept: list[list[int]] = []
    for i, m in enumerate(micros):
        given = []
        if i in idle:
            before.append(0)
            kept.append([])
            continue
        lane = (m.rank, m.lane)
        if lane in lane_last:
            given.append(lane_last[lane])
        lane_last[lane] = i
        if m.sender is not None:
            given.append(position[id(m.sender)])
        if m.awaits is not None and m.awaits.receiver is not None:
            given.append(position[id(m.awaits.receiver)])
        reached = 0
        for g in given:
            reached |= before[g] | (1 << g)
        mine: list[int] = []
        if conflicts[i]:
            mine, reached = _needed(conflicts[i], before, reached)
        before.append(reached)
        kept.append(mine)
    return kept


def _needed(conflicts: set[Conflict], before: list[int], given: int) -> tuple[list[int], int]:
    """Return the fewest dependencies that order every conflict, and the set of all that is then before."""
    if len(conflicts) == 1:
        ((depend, must),) = conflicts
        if (given >> must) & 1:
            return [], given
        return [depend], given | before[depend] | (1 << depend)
    mine: list[int] = []
    reached = given
    # Plain conflicts first, latest first: an earlier one often follows from a later one, and may make a
    # reclaim needless.
    for depend, must in sorted(conflicts, key=lambda c: (c[0] == c[1], c[1]), reverse=True):
        if not (reached >> must) & 1:
            mine.append(depend)
            reached |= before[depend] | (1 << depend)
    for depend in sorted(mine) if any(a != b for a, b in conflicts) else ():
        others = given
        for other in mine:
            if other != depend:
                others |= before[other] | (1 << other)
        if all((others >> must) & 1 for _, must in conflicts):
            mine.remove(depend)
            reached = others
    return sorted(mine), reached


def _conflicts(micros: list[Micro], position: dict[int, int]) -> list[set[Conflict]]:
    """For every instruction: earlier ones of its rank on the same memory, where one of the two writes."""
    writer: dict[int, int] = {}
    readers: dict[int, list[Conflict]] = defaultdict(list)
    found: list[set[Conflict]] = []
    for i, m in enumerate(micros):
        mine: set[Conflict] = set()
        if m.verb != "reclaim":
            for mem in m.reads():
                if mem in writer:
                    mine.add((writer[mem], writer[mem]))
        for mem in m.dst:
            if mem in writer:
                mine.add((writer[mem], writer[mem]))
            mine.update(readers.pop(mem, ()))
            writer[mem] = i
        for mem in m.reads():
            if mem not in m.dst and m.verb not in ("expose", "reclaim"):
                readers[mem].append((i, i))
        for expose in m.frees:
            assert expose.receiver is not None
            for mem in expose.src:
                readers[mem].append((i, position[id(expose.receiver)]))
        mine.discard((i, i))
        found.append(mine)
    return found
