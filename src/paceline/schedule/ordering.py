"""Dependencies of a lowered program: found from what instructions touch, then transitively reduced."""

from __future__ import annotations

from collections import defaultdict

from paceline.schedule.tidy import Micro


def order(micros: list[Micro]) -> list[list[int]]:
    """Dependencies of every micro-instruction, as positions in `micros` (same rank, sorted).

    Only those remain that lanes, messages, acknowledgements and other dependencies do not imply.
    """
    position = {id(m): i for i, m in enumerate(micros)}
    wanted = _conflicts(micros)
    before: list[int] = []  # bit set of everything that happens before an instruction
    lane_last: dict[tuple[int, int], int] = {}
    kept: list[list[int]] = []
    for i, m in enumerate(micros):
        given = []
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
        mine = []
        for w in sorted(wanted[i], reverse=True):
            if not (reached >> w) & 1:
                mine.append(w)
                reached |= before[w] | (1 << w)
        before.append(reached)
        kept.append(mine[::-1])
    return kept


def _conflicts(micros: list[Micro]) -> list[set[int]]:
    """For every instruction, the earlier ones of its rank that touch the same memory, one of them writing."""
    writer: dict[int, int] = {}
    readers: dict[int, list[int]] = defaultdict(list)
    found: list[set[int]] = []
    for i, m in enumerate(micros):
        mine: set[int] = set()
        for mem in m.reads():
            if mem in writer:
                mine.add(writer[mem])
        for mem in m.dst:
            if mem in writer:
                mine.add(writer[mem])
            mine.update(readers.pop(mem, ()))
        for mem in m.reads():
            readers[mem].append(i)
        for mem in m.dst:
            readers.pop(mem, None)
            writer[mem] = i
        mine.discard(i)
        found.append(mine)
    return found
