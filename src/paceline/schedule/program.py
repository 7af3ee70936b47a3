"""What a collective is: a frozen Program, made lazily of Steps, which are arrays of transfers.

A transfer copies or reduces `count` neighbouring chunks from (rank, buffer, chunk) to (rank, buffer, chunk):

    copy    dst  =  src
    reduce  dst  =  dst (op) src           the local operand is the left one

Meaning of a step: every transfer reads what was there before the step; then the writes happen in the order
of the arrays. Steps follow one another. Nothing else orders anything: dependencies follow from the data, and
`lower` derives them. A transfer whose two ranks are equal is local; a step of local transfers only is free
of messages and does not count as a communication step.

Buffers. INPUT is never written and OUTPUT holds the result (`contract` says which chunks of each); SCRATCH is
private. An algorithm that works in OUTPUT starts with a copy from INPUT, which lowering removes whenever
input and output are the same memory, or the copy can be avoided.

Chunks. A program moves chunks; their sizes come at run time. `chunk_offsets` below is the only rule, which
every executor follows. Chunks may be empty, so any number of elements works, also fewer than ranks.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from paceline.errors import ScheduleError

IntArray: TypeAlias = npt.NDArray[np.intp]
"""Integers, shape (n,) with n transfers unless said otherwise."""
Ints: TypeAlias = IntArray | int


class TransferKind(enum.IntEnum):
    """What a transfer does to its destination."""

    COPY = 0
    REDUCE = 1


class Buffer(enum.IntEnum):
    """Where chunks live."""

    INPUT = 0
    OUTPUT = 1
    SCRATCH = 2


INPUT, OUTPUT, SCRATCH = Buffer.INPUT, Buffer.OUTPUT, Buffer.SCRATCH
COPY, REDUCE = TransferKind.COPY, TransferKind.REDUCE


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """n transfers that happen at once; every field is an integer array of shape (n,). Read only.

    Equal columns of different steps may be the very same array object (`is`), which a consumer may use to
    remember what it derived from them.
    """

    kind: IntArray
    src_rank: IntArray
    src_buffer: IntArray
    src_chunk: IntArray
    dst_rank: IntArray
    dst_buffer: IntArray
    dst_chunk: IntArray
    count: IntArray
    channel: IntArray

    def __len__(self) -> int:
        return len(self.src_rank)

    @property
    def is_local(self) -> bool:
        """Whether no transfer crosses ranks."""
        return self.src_rank is self.dst_rank or bool(np.array_equal(self.src_rank, self.dst_rank))

    def columns(self) -> tuple[IntArray, ...]:
        """All nine columns in the order of the fields."""
        return (
            self.kind,
            self.src_rank,
            self.src_buffer,
            self.src_chunk,
            self.dst_rank,
            self.dst_buffer,
            self.dst_chunk,
            self.count,
            self.channel,
        )

    def ops(self) -> list[Op]:
        """Return the transfers one by one, for messages, drawings and tests; small steps only."""
        return [Op(*row) for row in zip(*(c.tolist() for c in self.columns()), strict=True)]


@dataclass(frozen=True, slots=True)
class Op:
    """One transfer of a Step as plain integers."""

    kind: int
    src_rank: int
    src_buffer: int
    src_chunk: int
    dst_rank: int
    dst_buffer: int
    dst_chunk: int
    count: int = 1
    channel: int = 0

    def __str__(self) -> str:
        def cell(rank: int, buffer: int, chunk: int) -> str:
            last = f"–{chunk + self.count - 1}" if self.count > 1 else ""
            return f"rank {rank} {Buffer(buffer).name.lower()}[{chunk}{last}]"

        src = cell(self.src_rank, self.src_buffer, self.src_chunk)
        dst = cell(self.dst_rank, self.dst_buffer, self.dst_chunk)
        return f"{TransferKind(self.kind).name.lower()} {src} → {dst}"


def step_of(ops: Iterable[Op]) -> Step:
    """Make a Step from single transfers."""
    rows = [
        (
            o.kind,
            o.src_rank,
            o.src_buffer,
            o.src_chunk,
            o.dst_rank,
            o.dst_buffer,
            o.dst_chunk,
            o.count,
            o.channel,
        )
        for o in ops
    ]
    table = np.array(rows, dtype=np.intp).reshape(-1, 9).T
    return Step(*(np.ascontiguousarray(c) for c in table))


@lru_cache(maxsize=512)
def _constant(value: int, n: int) -> IntArray:
    column = np.full(n, value, dtype=np.intp)
    column.flags.writeable = False
    return column


def _column(value: Ints, n: int) -> IntArray:
    if isinstance(value, np.ndarray) and value.ndim:
        return value if len(value) == n else np.broadcast_to(value, (n,))
    return _constant(int(value), n)


def _transfer(
    kind: TransferKind,
    src: Ints,
    dst: Ints,
    chunk: Ints,
    to: Ints | None,
    source: Ints,
    into: Ints,
    count: Ints,
    channel: Ints,
) -> Step:
    arguments = (src, dst, chunk, to, source, into, count, channel)
    n = max((len(v) for v in arguments if isinstance(v, np.ndarray) and v.ndim), default=1)
    c = _column(chunk, n)
    return Step(
        _column(int(kind), n),
        _column(src, n),
        _column(source, n),
        c,
        _column(dst, n),
        _column(into, n),
        c if to is None else _column(to, n),
        _column(count, n),
        _column(channel, n),
    )


def copy(
    src: Ints,
    dst: Ints,
    chunk: Ints,
    *,
    to: Ints | None = None,
    source: Ints = OUTPUT,
    into: Ints = OUTPUT,
    count: Ints = 1,
    channel: Ints = 0,
) -> Step:
    """Copy `chunk` of buffer `source` on rank `src` to chunk `to` (default: the same) of `into` on `dst`.

    Every argument is an integer or an array of shape (n,): n transfers at once.
    """
    return _transfer(COPY, src, dst, chunk, to, source, into, count, channel)


def reduce(
    src: Ints,
    dst: Ints,
    chunk: Ints,
    *,
    to: Ints | None = None,
    source: Ints = OUTPUT,
    into: Ints = OUTPUT,
    count: Ints = 1,
    channel: Ints = 0,
) -> Step:
    """As `copy`, but combine with what is at the destination."""
    return _transfer(REDUCE, src, dst, chunk, to, source, into, count, channel)


def together(*steps: Step) -> Step:
    """Return one step with all transfers of `steps` that move something; writes in this order."""
    parts = [s for s in steps if len(s)]
    if not parts:
        return step_of([])
    columns = [np.concatenate(c) for c in zip(*(s.columns() for s in parts), strict=True)]
    moves = columns[7] > 0
    return Step(*(columns if moves.all() else (c[moves] for c in columns)))


@lru_cache(maxsize=1 << 16)
def turn(num_ranks: int, by: int) -> IntArray:
    """(rank + by) mod P for every rank, shape (P,): a view of one table, so it costs no arithmetic."""
    by %= num_ranks
    return _wheel(num_ranks)[by : by + num_ranks]


@lru_cache(maxsize=64)
def _wheel(num_ranks: int) -> IntArray:
    table = np.arange(2 * num_ranks, dtype=np.intp) % num_ranks
    table.flags.writeable = False
    return table


def ranks(num_ranks: int) -> IntArray:
    """Return 0 … P−1, shape (P,), always the same array."""
    return turn(num_ranks, 0)


@dataclass(frozen=True)
class Program:
    """One collective operation for P ranks, as an algorithm performs it.

    `make_steps()` gives a fresh iterator of Steps each time; nothing is kept. `num_chunks` chunks make up the
    full buffer S of all cost formulas (the result for all_gather, the per-rank buffer for all_to_all); see
    `contract.shape` for how many chunks INPUT and OUTPUT have on each rank.
    """

    algorithm: str
    operation: str
    num_ranks: int
    num_chunks: int
    make_steps: Callable[[], Iterable[Step]] = field(repr=False)
    root: int = 0
    num_scratch: int = 0
    num_channels: int = 1

    def steps(self) -> Iterator[Step]:
        """Yield the steps in order, without empty ones."""
        return (s for s in self.make_steps() if len(s))

    def __str__(self) -> str:
        root = f", root {self.root}" if self.root else ""
        return f"{self.algorithm} {self.operation} on {self.num_ranks} ranks{root}"


def replicate(program: Program, copies: int) -> Program:
    """Cut every chunk into `copies` parts; each has a copy of the program, on channels of its own."""
    if copies < 1:
        raise ScheduleError(f"{program}: at least one parallel copy expected, got {copies}")
    if copies == 1:
        return program

    def steps() -> Iterator[Step]:
        part = np.arange(copies, dtype=np.intp)
        for s in program.steps():
            if s.is_local:  # all parts of neighbouring chunks are neighbours: no need to take them apart
                yield replace(
                    s, src_chunk=s.src_chunk * copies, dst_chunk=s.dst_chunk * copies, count=s.count * copies
                )
                continue
            first = np.repeat(np.arange(len(s)), s.count)
            inside = np.arange(len(first)) - np.repeat(np.cumsum(s.count) - s.count, s.count)
            which = np.repeat(first, copies)
            k = np.tile(part, len(first))
            offset = np.repeat(inside, copies)
            columns = [c[which] for c in s.columns()]
            columns[3] = (columns[3] + offset) * copies + k
            columns[6] = (columns[6] + offset) * copies + k
            columns[7] = _constant(1, len(which))
            columns[8] = columns[8] + k * program.num_channels
            yield Step(*columns)

    return replace(
        program,
        num_chunks=program.num_chunks * copies,
        num_scratch=program.num_scratch * copies,
        num_channels=program.num_channels * copies,
        make_steps=steps,
    )


def chunk_offsets(numel: int, parts: int) -> IntArray:
    """Balanced partition of `numel` elements: offsets, shape (parts + 1,).

    The first numel mod parts chunks have one element more: offset(i) = i·(numel div parts) + min(i, numel mod
    parts). This is the one rule of Paceline: chunks of a buffer, sub-chunks of a block and slices of a chunk.
    """
    size, extra = divmod(numel, parts)
    i = np.arange(parts + 1, dtype=np.intp)
    return i * size + np.minimum(i, extra)
