"""Lowering: from a Program's steps to the instruction lists that ranks execute (`lowered` has the format).

What it does, in this order:
1. A local copy moves nothing yet: the destination is noted to be *at* the source (`placement`). Who reads it
   reads the source; who reduces into it takes the source as left operand and writes the destination; what is
   still pending at the end is copied then. Before memory is overwritten, what is still needed of it is
   rescued, which is also what makes in-place programs correct.
2. Transfers of one step between one pair of ranks on one channel become one message. Within a step all sends
   come before all receives, so a step reads what was there before it.
3. Zero-copy: a message is not sent but exposed, and the receiver reads it in place, unless the source is
   overwritten in the same step; before its owner overwrites exposed memory, it reclaims it.
4. `tidy` writes results straight to where a last copy would take them, fuses receive + reduce + send, drops
   stores that nobody reads, and merges local copies.
5. `ordering` assigns lanes and finds the dependencies, transitively reduced.
"""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache

from paceline.errors import ScheduleError
from paceline.schedule import contract
from paceline.schedule.lowering.lowered import Instruction, Lowered, Run
from paceline.schedule.lowering.memory_layout import Placement, Row, last_reads
from paceline.schedule.lowering.ordering import order
from paceline.schedule.lowering.tidy import Micro, fuse, merge_copies, retarget
from paceline.schedule.program import REDUCE, Program, replicate


def lower(
    program: Program,
    *,
    in_place: bool = False,
    zero_copy: bool = False,
    fused: bool = True,
    slots: int = 2,
    slices: int = 1,
    channels: int = 1,
) -> Lowered:
    """Lower `program` for execution with `slots` messages in flight per connection.

    `channels` splits every chunk over that many times as many channels, `slices` goes to the executor.
    `fused` off keeps every receive and send apart. Raises ScheduleError where the program itself is wrong:
    reading memory that nothing has written, or combining different chunks. `verify` proves the result.
    """
    if slots < 1 or slices < 1:
        raise ScheduleError(f"{program}: at least one slot and one slice, got {slots} and {slices}")
    program = replicate(program, channels)
    work = _Lowering(program, in_place=in_place, zero_copy=zero_copy)
    live = {work.place.home[name] for name in work.place.results}
    micros = merge_copies(retarget(work.run()))
    micros = fuse(micros, live=live, enabled=fused)
    shape = contract.shape(program)
    return Lowered(
        algorithm=program.algorithm,
        operation=program.operation,
        num_ranks=program.num_ranks,
        root=program.root,
        num_chunks=program.num_chunks,
        chunks_per_block=shape.chunks_per_block,
        input_chunks=shape.input_chunks,
        output_chunks=shape.output_chunks,
        scratch_chunks=work.place.scratch_chunks,
        num_channels=program.num_channels,
        slots=slots,
        slices=slices,
        in_place=in_place,
        zero_copy=zero_copy,
        instructions=_lists(micros, work.place),
    )


@lru_cache(maxsize=2)
def _named(program: Program) -> tuple[list[list[Row]], dict[int, int]]:
    """Every step by names, and when names are last read: the same however a program is lowered."""
    place = Placement(program, in_place=False)
    rows = [place.rows(s) for s in program.steps()]
    return rows, last_reads(rows, place.name_width)


class _Lowering:
    """Walks the steps and appends micro-instructions of all ranks in one global order."""

    def __init__(self, program: Program, *, in_place: bool, zero_copy: bool) -> None:
        self.program, self.zero_copy = program, zero_copy
        self.place = Placement(program, in_place=in_place)
        self.micros: list[Micro] = []
        self._rows, self._last_read = _named(program)
        self._exposed: dict[int, list[Micro]] = defaultdict(list)
        self._unreclaimed: dict[tuple[int, int, int], list[Micro]] = defaultdict(list)
        self._sent: dict[tuple[int, int, int], list[Micro]] = defaultdict(list)

    def run(self) -> list[Micro]:
        """All instructions, in an order that respects every dependency and message."""
        for t, rows in enumerate(self._rows):
            self._step(t, rows)
        t, place = len(self._rows), self.place
        for name in place.results:
            if place.find(name, t, "ends without a result in") != place.home[name]:
                source = place.at[name]
                self._copy(name // place.name_width, self._prepare_write(name, t), source, t)
                place.put(name, place.home[name])
        for exposes in self._unreclaimed.values():
            if exposes:
                self._reclaim(exposes[-1], t)
        return self.micros

    def _step(self, t: int, rows: list[Row]) -> None:
        width = self.place.name_width
        messages = self._messages(rows)
        written = self._written(rows)
        for message in messages:
            if message[0][1] // width != message[0][2] // width:
                self._send(t, message, written)
        done: set[int] = set()
        for message in messages:
            kind, src, dst, _, _ = message[0]
            if src // width == dst // width:
                self._local(t, message[0], done)
            else:
                self._receive(t, kind, message)
            done.update(self.place.home[d + i] for _, _, d, n, _ in message for i in range(n))

    def _messages(self, rows: list[Row]) -> list[list[Row]]:
        """Group what one rank sends another on one channel, unless that would reorder writes to one chunk."""
        width = self.place.name_width
        groups: dict[tuple[int, ...], list[Row]] = {}
        times: dict[int, int] = defaultdict(int)
        for i, row in enumerate(rows):
            kind, src, dst, n, channel = row
            local = src // width == dst // width
            key = (i,) if local else (kind, src // width, dst // width, channel)
            groups.setdefault(key, []).append(row)
            for j in range(n):
                times[dst + j] += 1
        grouped = list(groups.values())
        shared = {name for name, n in times.items() if n > 1}
        if shared and self._order(grouped, shared) != self._order([[r] for r in rows], shared):
            return [[r] for r in rows]
        return grouped

    @staticmethod
    def _order(groups: list[list[Row]], shared: set[int]) -> dict[int, list[Row]]:
        seen: dict[int, list[Row]] = defaultdict(list)
        for group in groups:
            for row in group:
                for name in shared.intersection(range(row[2], row[2] + row[3])):
                    seen[name].append(row)
        return seen

    def _written(self, rows: list[Row]) -> set[int]:
        width, home = self.place.name_width, self.place.home
        return {
            home[dst + i]
            for kind, src, dst, n, _ in rows
            if kind == REDUCE or src // width != dst // width
            for i in range(n)
        }

    def _send(self, t: int, message: list[Row], written: set[int]) -> None:
        place, width = self.place, self.place.name_width
        _, src, dst, _, channel = message[0]
        cells = [place.find(s + i, t, "reads") for _, s, _, n, _ in message for i in range(n)]
        exposed = self.zero_copy and written.isdisjoint(cells)
        m = Micro("expose" if exposed else "send", src // width, channel=channel, src=cells, step=t)
        m.logical = [place.logical[c] for c in cells]
        m.send_peer = dst // width
        self.micros.append(m)
        self._sent[(m.rank, m.send_peer, channel)].append(m)
        if exposed:
            self._unreclaimed[(m.rank, m.send_peer, channel)].append(m)
            for cell in cells:
                self._exposed[cell].append(m)

    def _receive(self, t: int, kind: int, message: list[Row]) -> None:
        place = self.place
        _, src, dst, _, channel = message[0]
        sender = self._sent[(src // place.name_width, dst // place.name_width, channel)].pop(0)
        names = [d + i for _, _, d, n, _ in message for i in range(n)]
        if kind == REDUCE:
            self._check_operands(t, names, sender.logical)
        homes = [self._prepare_write(name, t) for name in names]
        m = Micro("", dst // place.name_width, channel=channel, dst=homes, logical=sender.logical, step=t)
        m.sender, m.recv_peer, sender.receiver = sender, sender.rank, m
        m.verb = "read" if sender.verb == "expose" else "recv"
        if m.verb == "read":
            m.far = sender.src
        if kind == REDUCE:
            m.verb += "_reduce"
            m.src = [place.at[name] for name in names]
        self.micros.append(m)
        for name, home, logical in zip(names, homes, sender.logical, strict=True):
            place.put(name, home)
            place.logical[home] = logical

    def _local(self, t: int, row: Row, done: set[int]) -> None:
        kind, src, dst, n, _ = row
        place, rank = self.place, row[2] // self.place.name_width
        sources = [place.find(src + i, t, "reads") for i in range(n)]
        for i, source in enumerate(sources):
            if source in done:
                raise ScheduleError(
                    f"{self.program}: step {t} reads {place.describe(src + i)} locally after writing it; "
                    "make two steps of it"
                )
        for i, source in enumerate(sources):
            if kind != REDUCE:
                place.put(dst + i, source)
                continue
            self._check_operands(t, [dst + i], [place.logical[source]])
            home, logical = self._prepare_write(dst + i, t), place.logical[source]
            m = Micro(
                "reduce", rank, dst=[home], src=[place.at[dst + i]], far=[source], logical=[logical], step=t
            )
            self.micros.append(m)
            place.put(dst + i, home)
            place.logical[home] = logical

    def _check_operands(self, t: int, names: list[int], logical: list[int]) -> None:
        for name, incoming in zip(names, logical, strict=True):
            own = self.place.logical[self.place.find(name, t, "reduces into")]
            if own != incoming:
                raise ScheduleError(
                    f"{self.program}: step {t} reduces logical chunk {incoming} into "
                    f"{self.place.describe(name)}, which holds logical chunk {own}"
                )

    def _prepare_write(self, name: int, t: int) -> int:
        """Free the home of `name` to be overwritten: rescue what else is there, reclaim it from readers."""
        place = self.place
        mem = place.home[name]
        for other in sorted(place.names_at[mem] - {name}):
            if other in place.results or self._last_read.get(other, -1) > 2 * t:
                self._copy(other // place.name_width, target := place.refuge(other), mem, t)
                place.put(other, target)
            else:
                place.forget(other)
        for expose in self._exposed.pop(mem, ()):
            self._reclaim(expose, t)
        return mem

    def _copy(self, rank: int, dst: int, src: int, t: int) -> None:
        for expose in self._exposed.pop(dst, ()):
            self._reclaim(expose, t)
        logical = self.place.logical[dst] = self.place.logical[src]
        self.micros.append(Micro("copy", rank, dst=[dst], src=[src], logical=[logical], step=t))

    def _reclaim(self, expose: Micro, t: int) -> None:
        """Wait until the reader of `expose`, and of all exposed before it on that connection, is done."""
        waiting = self._unreclaimed[(expose.rank, expose.send_peer, expose.channel)]
        if expose not in waiting:
            return
        until = waiting.index(expose) + 1
        m = Micro("reclaim", expose.rank, channel=expose.channel, step=t)
        m.send_peer, m.awaits = expose.send_peer, expose
        m.frees = waiting[:until]
        del waiting[:until]
        self.micros.append(m)


def _lists(micros: list[Micro], place: Placement) -> list[list[Instruction]]:
    """Return the instructions of every rank, with lanes, message numbers and dependencies filled in."""
    micros, dependencies = order(micros)
    lists: list[list[Instruction]] = [[] for _ in range(place.program.num_ranks)]
    index: list[int] = []
    numbers: dict[tuple[int, int, int], int] = defaultdict(int)
    for m in micros:
        index.append(len(lists[m.rank]))
        i = Instruction(m.verb, m.lane, m.channel, m.recv_peer, -1, m.send_peer, -1, step=m.step)
        if m.receiver is not None:
            key = (m.rank, m.send_peer, m.channel)
            m.number, numbers[key] = numbers[key], numbers[key] + 1
            i.send_message = m.number
        if m.awaits is not None:
            i.send_message = m.awaits.number
        if m.sender is not None:
            i.recv_message = m.sender.number
        i.dst, i.src = _runs(m.dst, m.logical, place), _runs(m.src, m.logical, place)
        if m.far:
            i.far = _runs(m.far, m.logical, place)
        i.deps = [index[d] for d in dependencies[len(index) - 1]]
        lists[m.rank].append(i)
    return lists


def _runs(cells: list[int], logical: list[int], place: Placement) -> list[Run]:
    if not cells:
        return []
    if len(cells) == 1:
        return [(*place.place_of(cells[0]), logical[0], 1)]
    runs: list[Run] = []
    for mem, number in zip(cells, logical, strict=True):
        buffer, chunk = place.place_of(mem)
        if runs:
            b, c, first, n = runs[-1]
            if b == buffer and c + n == chunk and first + n == number:
                runs[-1] = (b, c, first, n + 1)
                continue
        runs.append((buffer, chunk, number, 1))
    return runs
