"""Where every chunk is while a program is lowered: names, memory, and copies that need not be made.

A *name* is a place of the Program: (rank, buffer, chunk). *Memory* is a place of the lowered program. Each
name has a home in memory, but its content may be *at* other memory: a local copy moves nothing, it only
records that the destination is at the source. Names and memory are numbered rank · width + place.
"""

from __future__ import annotations

from collections import defaultdict

from paceline.errors import ScheduleError
from paceline.schedule import contract
from paceline.schedule.program import INPUT, OUTPUT, REDUCE, Buffer, Program, Step

NamedTransfer = tuple[int, int, int, int, int]
"""One transfer of one step: (kind, source name, destination name, number of chunks, channel)."""


class MemoryLayout:
    """Names, their homes, and which memory holds what.

    `home[name]`: memory where the content of a name belongs. `at[name]`: memory where it is. `names_at[mem]`:
    names whose content is there. `logical[mem]`: logical chunk that the memory holds. `results`: names that
    must be at home when the program ends.
    """

    def __init__(self, program: Program, *, in_place: bool) -> None:
        self.program, self.in_place = program, in_place
        shape = contract.shape(program)
        p, inputs, outputs = program.num_ranks, shape.input_chunks, shape.output_chunks
        self._starts = (0, inputs, inputs + outputs, inputs + outputs + program.num_scratch)
        self.name_width = self._starts[3]
        self._larger = int(INPUT if inputs > outputs else OUTPUT)
        self._scratch = max(inputs, outputs) if in_place else inputs + outputs
        self._rescue_start = self._scratch + program.num_scratch
        self.width = self._rescue_start + self._starts[2]
        self._rescued = [0] * p
        self.home = [m for rank in range(p) for m in self._homes(rank)]
        self.at: dict[int, int] = {}
        self.names_at: dict[int, set[int]] = defaultdict(set)
        self.logical: dict[int, int] = {}
        for rank in range(p):
            if contract.defines_input(program, rank):
                for chunk, logical in enumerate(contract.logical_input(program, rank).tolist()):
                    name = rank * self.name_width + chunk
                    self.put(name, self.home[name])
                    self.logical[self.home[name]] = logical
        owners = [r for r in range(p) if contract.defines_output(program, r)]
        self.results = {r * self.name_width + inputs + c: r for r in owners for c in range(outputs)}

    @property
    def scratch_chunks(self) -> int:
        """Scratch chunks that the lowered program needs on each rank."""
        return self.program.num_scratch + max(self._rescued)

    def _homes(self, rank: int) -> list[int]:
        inputs, outputs = self._starts[1], self._starts[2] - self._starts[1]
        offset = contract.in_place_offset(self.program, rank) if self.in_place else 0
        first_in = offset if inputs < outputs else 0
        first_out = (offset if outputs < inputs else 0) if self.in_place else inputs
        places = [
            *range(first_in, first_in + inputs),
            *range(first_out, first_out + outputs),
            *range(self._scratch, self._rescue_start),
        ]
        return [rank * self.width + place for place in places]

    def rows(self, step: Step) -> list[NamedTransfer]:
        """Transfers of a step with names for places; ScheduleError if one does not exist."""
        name = self.name
        return [
            (kind, name(sr, sb, sc, n), name(dr, db, dc, n), n, channel)
            for kind, sr, sb, sc, dr, db, dc, n, channel in zip(
                *(c.tolist() for c in step.columns()), strict=True
            )
            if n
        ]

    def name(self, rank: int, buffer: int, chunk: int, count: int = 1) -> int:
        """Number of the first of `count` neighbouring names."""
        if not 0 <= rank < self.program.num_ranks:
            raise ScheduleError(f"{self.program}: rank {rank} does not exist")
        size = self._starts[buffer + 1] - self._starts[buffer]
        if chunk < 0 or count < 0 or chunk + count > size:
            what = f"chunk {chunk}" if count == 1 else f"chunks {chunk} to {chunk + count - 1}"
            raise ScheduleError(
                f"{self.program}: rank {rank} has {size} chunks of {Buffer(buffer).name}; no {what}"
            )
        return rank * self.name_width + self._starts[buffer] + chunk

    def describe(self, name: int) -> str:
        """Return `rank 3 output[2]`, for error messages."""
        rank, place = divmod(name, self.name_width)
        buffer = max(b for b in range(3) if self._starts[b] <= place)
        return f"rank {rank} {Buffer(buffer).name.lower()}[{place - self._starts[buffer]}]"

    def place_of(self, mem: int) -> tuple[int, int]:
        """(buffer, chunk) of this memory in the lowered program; plain integers, for speed."""
        place = mem % self.width
        if place >= self._scratch:
            return 2, place - self._scratch
        if self.in_place:
            return self._larger, place
        return (0, place) if place < self._starts[1] else (1, place - self._starts[1])

    def put(self, name: int, mem: int) -> None:
        """Record that the content of `name` is at `mem`."""
        self.forget(name)
        self.at[name] = mem
        self.names_at[mem].add(name)

    def forget(self, name: int) -> None:
        """Record that `name` holds nothing."""
        old = self.at.pop(name, None)
        if old is not None:
            self.names_at[old].discard(name)

    def find(self, name: int, t: int, verb: str) -> int:
        """Memory where `name` is; ScheduleError if it holds nothing."""
        mem = self.at.get(name)
        if mem is None:
            raise ScheduleError(f"{self.program}: step {t} {verb} {self.describe(name)}, which holds nothing")
        return mem

    def refuge(self, name: int) -> int:
        """Memory for the content of `name`, whose present place is about to be overwritten."""
        target, rank = self.home[name], name // self.name_width
        if target != self.at[name] and not self.names_at[target] - {name}:
            return target
        self._rescued[rank] += 1
        return rank * self.width + self._rescue_start + self._rescued[rank] - 1


def last_reads(steps: list[list[NamedTransfer]], width: int) -> dict[int, int]:
    """Name → 2·step if it is last read by a message, 2·step + 1 if locally or as operand of a reduction."""
    last: dict[int, int] = {}
    for t, rows in enumerate(steps):
        for kind, src, dst, n, _ in rows:
            is_local = src // width == dst // width  # done after the step's sends, when others have written
            for i in range(n):
                last[src + i] = max(last.get(src + i, 0), 2 * t + is_local)
                if kind == REDUCE:
                    last[dst + i] = 2 * t + 1
    return last
