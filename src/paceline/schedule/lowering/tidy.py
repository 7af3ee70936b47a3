"""Peephole passes of lowering, on the instructions of all ranks in one global order."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

ConnectionKey = tuple[int, int, int]
"""(sending rank, receiving rank, channel)"""


@dataclass(slots=True, eq=False)
class Micro:
    """An instruction while it is lowered: with memory instead of runs, and links instead of numbers.

    `dst`, `src`, `operand`: memory of `MemoryLayout`, chunk by chunk; `logical`: the logical chunk of each.
    The other fields are those of `lowered.Instruction`.
    """

    verb: str
    rank: int
    channel: int = 0
    dst: list[int] = field(default_factory=list)
    src: list[int] = field(default_factory=list)
    operand: list[int] = field(default_factory=list)
    logical: list[int] = field(default_factory=list)
    step: int = -1
    recv_peer: int = -1
    send_peer: int = -1
    sender: Micro | None = None
    """The instruction that posts the message that this one takes."""
    receiver: Micro | None = None
    """The instruction that takes the message that this one posts."""
    awaits: Micro | None = None
    """The expose that this reclaim waits for, with all before it on the connection."""
    frees: list[Micro] = field(default_factory=list)
    """The exposes that no earlier reclaim waits for."""
    lane: int = -1
    number: int = -1

    def reads(self) -> list[int]:
        """Return the memory of its own rank that it reads, or that must not change before it is done."""
        if self.verb == "reduce":
            return self.src + self.operand
        if self.verb == "reclaim":
            return [mem for expose in self.frees for mem in expose.src]
        return self.src


def retarget(micros: list[Micro]) -> list[Micro]:
    """If a copy is the only use of what an instruction stores, store it at the copy's destination instead."""
    accesses: dict[int, list[int]] = defaultdict(list)
    for i, m in enumerate(micros):
        for mem in {*m.reads(), *m.dst}:
            accesses[mem].append(i)
    gone: set[int] = set()
    for i, m in enumerate(micros):
        if m.verb != "copy" or accesses[m.src[0]][-1] != i or len(accesses[m.src[0]]) < 2:
            continue
        source, target = m.src[0], m.dst[0]
        writer = accesses[source][-2]
        w = micros[writer]
        others = [k for k in accesses[target] if k >= writer and k != i]
        if source not in w.dst or source in w.src or w.dst.count(source) > 1:
            continue
        if others and (others != [writer] or len(w.dst) > 1):
            continue  # another instruction uses the destination in between
        w.dst[w.dst.index(source)] = target
        accesses[source] = accesses[source][:-2]
        accesses[target] = sorted({*accesses[target], writer} - {i})
        gone.add(i)
    return [m for i, m in enumerate(micros) if i not in gone]


def merge_copies(micros: list[Micro]) -> list[Micro]:
    """Join neighbouring local copies of one rank into one instruction."""
    kept: list[Micro] = []
    last: dict[int, Micro] = {}
    for m in micros:
        before = last.get(m.rank)
        if m.verb == "copy" and before is not None and before.verb == "copy":
            touched = {*before.dst, *before.src}
            if touched.isdisjoint(m.dst) and not {*before.dst} & {*m.src}:
                before.dst += m.dst
                before.src += m.src
                before.logical += m.logical
                continue
        last[m.rank] = m
        kept.append(m)
    return kept


def fuse(micros: list[Micro], *, live: set[int], enabled: bool = True) -> list[Micro]:
    """Fuse a receive with the one send that forwards its result; drop stores that nothing reads.

    `live`: memory that must hold a result at the end.
    """
    lanes = _Lanes()
    previous = _previous_posts(micros)
    gone: set[int] = set()
    upcoming: dict[int, tuple[Micro, bool]] = {}  # memory → its next access, and whether that only overwrites
    position = {id(m): i for i, m in enumerate(micros)}
    after: dict[int, dict[int, tuple[Micro, bool]]] = {}  # send → what follows it at each place it reads
    for i in range(len(micros) - 1, -1, -1):
        m = micros[i]
        if enabled and m.verb in ("recv", "recv_reduce") and m.dst:
            send = upcoming.get(m.dst[0], (m, True))[0]
            fits = send.verb == "send" and send.src == m.dst and send.channel == m.channel
            fits = fits and all(upcoming[mem] == (send, False) for mem in m.dst)
            if fits and previous[id(send)] < i and lanes.join(m, send):
                follows = after[id(send)]
                _forward(m, send)
                gone.add(position[id(send)])
                if not any(mem in live and mem not in follows for mem in m.dst) and all(
                    only_overwrites for _, only_overwrites in follows.values()
                ):
                    m.dst = []
                for mem in send.src:
                    upcoming.pop(mem, None)
                    if mem in follows:
                        upcoming[mem] = follows[mem]
        reads = m.reads()
        if m.verb == "send":
            after[id(m)] = {mem: upcoming[mem] for mem in reads if mem in upcoming}
        for mem in m.dst:
            upcoming[mem] = (m, True)
        for mem in reads:
            upcoming[mem] = (m, False)
    kept = [m for i, m in enumerate(micros) if i not in gone]
    lanes.number(kept)
    return kept


def _forward(m: Micro, send: Micro) -> None:
    m.verb = f"{m.verb}_send"
    m.send_peer, m.receiver = send.send_peer, send.receiver
    assert m.receiver is not None
    m.receiver.sender = m


def _previous_posts(micros: list[Micro]) -> dict[int, int]:
    """For each sending instruction, the position of the one before it on its connection, or −1."""
    last: dict[ConnectionKey, int] = {}
    previous = {}
    for i, m in enumerate(micros):
        if m.receiver is not None:
            key = (m.rank, m.send_peer, m.channel)
            previous[id(m)] = last.get(key, -1)
            last[key] = i
    return previous


class _Lanes:
    """Which receiving and sending ends share a lane: at most one of each."""

    def __init__(self) -> None:
        self._sends_of: dict[ConnectionKey, ConnectionKey] = {}
        self._receives_of: dict[ConnectionKey, ConnectionKey] = {}

    def join(self, receive: Micro, send: Micro) -> bool:
        """Put both ends on one lane; False if one of them already shares with another."""
        r = (receive.recv_peer, receive.rank, receive.channel)
        s = (send.rank, send.send_peer, send.channel)
        if self._sends_of.get(r, s) != s or self._receives_of.get(s, r) != r:
            return False
        self._sends_of[r], self._receives_of[s] = s, r
        return True

    def number(self, micros: list[Micro]) -> None:
        """Give every instruction its lane, numbered per rank in order of appearance."""
        numbers: dict[tuple[int, ConnectionKey | None, ConnectionKey | None], int] = {}
        used: dict[int, int] = defaultdict(int)
        for m in micros:
            r = (m.recv_peer, m.rank, m.channel) if m.recv_peer >= 0 else None
            s = (m.rank, m.send_peer, m.channel) if m.send_peer >= 0 else None
            if r is not None:
                s = self._sends_of.get(r)
            elif s is not None:
                r = self._receives_of.get(s)
            key = (m.rank, r, s)
            if key not in numbers:
                numbers[key] = used[m.rank]
                used[m.rank] += 1
            m.lane = numbers[key]
