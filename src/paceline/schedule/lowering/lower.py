"""Lowering: from a Program's steps to the instruction lists that ranks execute (`lowered` has the format).

It works in this order:

1. A local copy moves nothing yet: it is only recorded that the destination is *at* the source (see
   `memory_layout`). An instruction that reads the destination reads the source instead; one that reduces into
   it takes the source as left operand and writes the destination. Copies that are still pending at the end
   are made then. Before memory is overwritten, what is still needed of it is copied elsewhere; this is also
   what makes in-place programs correct.
2. Transfers of one step between one pair of ranks on one channel become one message. Within a step all sends
   come before all receives, so that a step reads what was there before it.
3. Zero-copy: a message is exposed instead of sent, and the receiver reads it in place, unless the source is
   overwritten in the same step. Before its owner overwrites exposed memory, it reclaims it.
4. `tidy` writes results directly to where a last copy would take them, fuses receive + reduce + send, drops
   stores that nothing reads, and merges local copies.
5. `ordering` assigns lanes and finds the dependencies, transitively reduced.
"""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache

from paceline.errors import ScheduleError
from paceline.schedule import contract
from paceline.schedule.lowering.lowered import ChunkRun, Instruction, Lowered
from paceline.schedule.lowering.memory_layout import MemoryLayout, NamedTransfer, last_reads
from paceline.schedule.lowering.ordering import order
from paceline.schedule.lowering.tidy import Micro, fuse, merge_copies, retarget
from paceline.schedule.program import REDUCE, Program


def lower(
    program: Program,
    *,
    in_place: bool = False,
    zero_copy: bool = False,
    fused: bool = True,
    slots: int = 2,
) -> Lowered:
    """Lower `program` to instruction lists; `verify` proves the result.

    Args:
        program: What to lower.
        in_place: INPUT and OUTPUT are the same memory, as `contract` says.
        zero_copy: Peers read each other's buffers. The executor does not run such forms.
        fused: Whether a receive, its reduction and the send of the result may become one instruction.
        slots: Messages in flight per connection, at least 1. Fused forms may deadlock with 1.

    Raises:
        ScheduleError: The program itself is wrong: it reads memory that nothing has written, or combines
            different chunks.
    """
    if slots < 1:
        raise ScheduleError(f"{program}: at least one slot expected, got {slots}")
    work = _Lowering(program, in_place=in_place, zero_copy=zero_copy)
    live = {work.layout.home[name] for name in work.layout.results}
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
        scratch_chunks=work.layout.scratch_chunks,
        num_channels=program.num_channels,
        slots=slots,
        in_place=in_place,
        zero_copy=zero_copy,
        instructions=_lists(micros, work.layout),
    )


@lru_cache(maxsize=2)
def _named(program: Program) -> tuple[list[list[NamedTransfer]], dict[int, int]]:
    """Every step as transfers between names, and when each name is last read: the same for every form."""
    layout = MemoryLayout(program, in_place=False)
    rows = [layout.rows(s) for s in program.steps()]
    return rows, last_reads(rows, layout.name_width)


class _Lowering:
    """Walks the steps and appends micro-instructions of all ranks in one global order."""

    def __init__(self, program: Program, *, in_place: bool, zero_copy: bool) -> None:
        self.program, self.zero_copy = program, zero_copy
        self.layout = MemoryLayout(program, in_place=in_place)
        self.micros: list[Micro] = []
        self._steps, self._last_read = _named(program)
        self._exposed: dict[int, list[Micro]] = defaultdict(list)
        self._unreclaimed: dict[tuple[int, int, int], list[Micro]] = defaultdict(list)
        self._sent: dict[tuple[int, int, int], list[Micro]] = defaultdict(list)

    def run(self) -> list[Micro]:
        """Return all instructions, in an order that respects every dependency and message."""
        for t, rows in enumerate(self._steps):
            self._step(t, rows)
        t, layout = len(self._steps), self.layout
        for name in layout.results:
            if layout.find(name, t, "ends without a result in") != layout.home[name]:
                source = layout.at[name]
                self._copy(name // layout.name_width, self._prepare_write(name, t), source, t)
                layout.put(name, layout.home[name])
        for exposes in self._unreclaimed.values():
            if exposes:
                self._reclaim(exposes[-1], t)
        return self.micros

    def _step(self, t: int, rows: list[NamedTransfer]) -> None:
        width = self.layout.name_width
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
            done.update(self.layout.home[d + i] for _, _, d, n, _ in message for i in range(n))

    def _messages(self, rows: list[NamedTransfer]) -> list[list[NamedTransfer]]:
        """Group the transfers of one pair of ranks on one channel, unless that reorders writes to a chunk."""
        width = self.layout.name_width
        groups: dict[tuple[int, ...], list[NamedTransfer]] = {}
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
    def _order(groups: list[list[NamedTransfer]], shared: set[int]) -> dict[int, list[NamedTransfer]]:
        seen: dict[int, list[NamedTransfer]] = defaultdict(list)
        for group in groups:
            for row in group:
                for name in shared.intersection(range(row[2], row[2] + row[3])):
                    seen[name].append(row)
        return seen

    def _written(self, rows: list[NamedTransfer]) -> set[int]:
        width, home = self.layout.name_width, self.layout.home
        return {
            home[dst + i]
            for kind, src, dst, n, _ in rows
            if kind == REDUCE or src // width != dst // width
            for i in range(n)
        }

    def _send(self, t: int, message: list[NamedTransfer], written: set[int]) -> None:
        layout, width = self.layout, self.layout.name_width
        _, src, dst, _, channel = message[0]
        cells = [layout.find(s + i, t, "reads") for _, s, _, n, _ in message for i in range(n)]
        exposed = self.zero_copy and written.isdisjoint(cells)
        m = Micro("expose" if exposed else "send", src // width, channel=channel, src=cells, step=t)
        m.logical = [layout.logical[c] for c in cells]
        m.send_peer = dst // width
        self.micros.append(m)
        self._sent[(m.rank, m.send_peer, channel)].append(m)
        if exposed:
            self._unreclaimed[(m.rank, m.send_peer, channel)].append(m)
            for cell in cells:
                self._exposed[cell].append(m)

    def _receive(self, t: int, kind: int, message: list[NamedTransfer]) -> None:
        layout = self.layout
        _, src, dst, _, channel = message[0]
        sender = self._sent[(src // layout.name_width, dst // layout.name_width, channel)].pop(0)
        names = [d + i for _, _, d, n, _ in message for i in range(n)]
        if kind == REDUCE:
            self._check_operands(t, names, sender.logical)
        homes = [self._prepare_write(name, t) for name in names]
        m = Micro("", dst // layout.name_width, channel=channel, dst=homes, logical=sender.logical, step=t)
        m.sender, m.recv_peer, sender.receiver = sender, sender.rank, m
        m.verb = "read" if sender.verb == "expose" else "recv"
        if m.verb == "read":
            m.operand = sender.src
        if kind == REDUCE:
            m.verb += "_reduce"
            m.src = [layout.at[name] for name in names]
        self.micros.append(m)
        for name, home, logical in zip(names, homes, sender.logical, strict=True):
            layout.put(name, home)
            layout.logical[home] = logical

    def _local(self, t: int, row: NamedTransfer, done: set[int]) -> None:
        kind, src, dst, n, _ = row
        layout, rank = self.layout, row[2] // self.layout.name_width
        sources = [layout.find(src + i, t, "reads") for i in range(n)]
        for i, source in enumerate(sources):
            if source in done:
                raise ScheduleError(
                    f"{self.program}: step {t} reads {layout.describe(src + i)} locally after writing it; "
                    "make two steps of it"
                )
        for i, source in enumerate(sources):
            if kind != REDUCE:
                layout.put(dst + i, source)
                continue
            self._check_operands(t, [dst + i], [layout.logical[source]])
            home, logical = self._prepare_write(dst + i, t), layout.logical[source]
            m = Micro(
                "reduce",
                rank,
                dst=[home],
                src=[layout.at[dst + i]],
                operand=[source],
                logical=[logical],
                step=t,
            )
            self.micros.append(m)
            layout.put(dst + i, home)
            layout.logical[home] = logical

    def _check_operands(self, t: int, names: list[int], logical: list[int]) -> None:
        for name, incoming in zip(names, logical, strict=True):
            own = self.layout.logical[self.layout.find(name, t, "reduces into")]
            if own != incoming:
                raise ScheduleError(
                    f"{self.program}: step {t} reduces logical chunk {incoming} into "
                    f"{self.layout.describe(name)}, which holds logical chunk {own}"
                )

    def _prepare_write(self, name: int, t: int) -> int:
        """Make the home of `name` free to be overwritten: rescue other content, reclaim it from readers."""
        layout = self.layout
        mem = layout.home[name]
        for other in sorted(layout.names_at[mem] - {name}):
            if other in layout.results or self._last_read.get(other, -1) > 2 * t:
                self._copy(other // layout.name_width, target := layout.refuge(other), mem, t)
                layout.put(other, target)
            else:
                layout.forget(other)
        for expose in self._exposed.pop(mem, ()):
            self._reclaim(expose, t)
        return mem

    def _copy(self, rank: int, dst: int, src: int, t: int) -> None:
        for expose in self._exposed.pop(dst, ()):
            self._reclaim(expose, t)
        logical = self.layout.logical[dst] = self.layout.logical[src]
        self.micros.append(Micro("copy", rank, dst=[dst], src=[src], logical=[logical], step=t))

    def _reclaim(self, expose: Micro, t: int) -> None:
        """Wait until `expose`, and everything exposed before it on that connection, has been read."""
        waiting = self._unreclaimed[(expose.rank, expose.send_peer, expose.channel)]
        if expose not in waiting:
            return
        until = waiting.index(expose) + 1
        m = Micro("reclaim", expose.rank, channel=expose.channel, step=t)
        m.send_peer, m.awaits = expose.send_peer, expose
        m.frees = waiting[:until]
        del waiting[:until]
        self.micros.append(m)


def _lists(micros: list[Micro], layout: MemoryLayout) -> list[list[Instruction]]:
    """Return the instructions of every rank, with lanes, message numbers and dependencies filled in."""
    micros, dependencies = order(micros)
    lists: list[list[Instruction]] = [[] for _ in range(layout.program.num_ranks)]
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
        i.dst, i.src = _runs(m.dst, m.logical, layout), _runs(m.src, m.logical, layout)
        if m.operand:
            i.operand = _runs(m.operand, m.logical, layout)
        i.deps = [index[d] for d in dependencies[len(index) - 1]]
        lists[m.rank].append(i)
    return lists


def _runs(cells: list[int], logical: list[int], layout: MemoryLayout) -> list[ChunkRun]:
    if not cells:
        return []
    if len(cells) == 1:
        return [(*layout.place_of(cells[0]), logical[0], 1)]
    runs: list[ChunkRun] = []
    for mem, number in zip(cells, logical, strict=True):
        buffer, chunk = layout.place_of(mem)
        if runs:
            b, c, first, n = runs[-1]
            if b == buffer and c + n == chunk and first + n == number:
                runs[-1] = (b, c, first, n + 1)
                continue
        runs.append((buffer, chunk, number, 1))
    return runs
