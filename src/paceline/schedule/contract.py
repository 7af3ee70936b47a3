"""What every operation promises: how chunks lie in the buffers, and whose contributions each must hold.

A chunk's content is a multiset of contributors (how many times each rank's input is in it) together with the
number of the logical block that it belongs to. Preconditions give each rank's INPUT, postconditions its
OUTPUT.

| operation      | INPUT of rank r      | OUTPUT of rank r           | a chunk of block b holds  |
|----------------|----------------------|----------------------------|---------------------------|
| all_reduce     | whole buffer         | whole buffer               | every rank once           |
| reduce         | whole buffer         | whole buffer, on the root  | every rank once           |
| broadcast      | whole, on the root   | whole buffer               | the root                  |
| all_gather     | block r              | P blocks                   | rank b                    |
| gather         | block r              | P blocks, on the root      | rank b                    |
| reduce_scatter | P blocks             | block r                    | every rank once           |
| scatter        | P blocks, on root    | block r                    | the root                  |
| all_to_all     | P blocks, to rank b  | P blocks, from rank b      | rank b                    |
| barrier        | one empty chunk      | one empty chunk            | every rank, at least once |

The v-forms (`all_gather_v` …) have the same programs and contracts: their counts are run-time data.
In place means: OUTPUT is INPUT (whole-buffer operations, all_to_all), INPUT is block r of OUTPUT (gathers),
or OUTPUT is block r of INPUT (scatters).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from paceline.errors import ConfigError, ScheduleError
from paceline.registry import unknown
from paceline.schedule.program import chunk_offsets

WHOLE = ("all_reduce", "reduce", "broadcast", "barrier")
"""Operations with one buffer of `num_chunks` chunks on every rank."""
BLOCKS = ("all_gather", "gather", "reduce_scatter", "scatter", "all_to_all")
"""Operations with P blocks of `num_chunks / P` chunks each."""
ROOTED = ("reduce", "broadcast", "gather", "scatter")
REDUCING = ("all_reduce", "reduce", "reduce_scatter", "barrier")
V_FORMS = {"all_gather_v": "all_gather", "reduce_scatter_v": "reduce_scatter", "all_to_all_v": "all_to_all"}
OPERATIONS = (
    "all_reduce",
    "reduce",
    "reduce_scatter",
    "all_gather",
    "broadcast",
    "gather",
    "scatter",
    "all_to_all",
    "barrier",
    *V_FORMS,
)

BlockCounts: TypeAlias = Sequence[Sequence[int]] | Sequence[int] | npt.NDArray[np.intp] | int
"""Size of a call in elements, as `layout` takes it."""


def base_operation(operation: str) -> str:
    """`all_gather_v` → `all_gather`; ConfigError for an operation that does not exist."""
    if operation not in OPERATIONS:
        raise ConfigError(unknown("operation", operation, OPERATIONS))
    return V_FORMS.get(operation, operation)


class Collective(Protocol):
    """What a contract depends on: a Program or its lowered form."""

    @property
    def operation(self) -> str:
        """What it does, one of OPERATIONS."""

    @property
    def num_ranks(self) -> int:
        """P, the number of ranks."""

    @property
    def num_chunks(self) -> int:
        """Number of chunks of the full buffer."""

    @property
    def root(self) -> int:
        """Root of broadcast, reduce, gather and scatter."""


@dataclass(frozen=True)
class Shape:
    """How many chunks INPUT and OUTPUT have on every rank, and how many make one block."""

    input_chunks: int
    output_chunks: int
    chunks_per_block: int


def shape(program: Collective) -> Shape:
    """Chunk counts of a program's buffers; ScheduleError if its chunks do not divide into P blocks."""
    op, n, p = base_operation(program.operation), program.num_chunks, program.num_ranks
    if op in WHOLE:
        return Shape(n, n, n)
    if n % p:
        raise ScheduleError(
            f"{program}: {n} chunks do not make {p} equal blocks; give a multiple of the number of ranks"
        )
    block = n // p
    inputs = block if op in ("all_gather", "gather") else n
    outputs = block if op in ("reduce_scatter", "scatter") else n
    return Shape(inputs, outputs, block)


def in_place_offset(program: Collective, rank: int) -> int:
    """In place: the chunk of the larger of INPUT and OUTPUT where the smaller one begins."""
    s = shape(program)
    return 0 if s.input_chunks == s.output_chunks else rank * s.chunks_per_block


def logical_input(program: Collective, rank: int) -> npt.NDArray[np.int64]:
    """Logical chunk number of each INPUT chunk of `rank`, shape (input_chunks,).

    Equal numbers have equal sizes at run time and may be combined. For all_to_all the number is
    (source·P + destination)·chunks_per_block + part; otherwise it is the chunk of the whole buffer.
    """
    s, op = shape(program), base_operation(program.operation)
    start = 0
    if op in ("all_gather", "gather"):
        start = rank * s.chunks_per_block
    elif op == "all_to_all":
        start = rank * program.num_chunks
    return start + np.arange(s.input_chunks)


def logical_output(program: Collective, rank: int) -> npt.NDArray[np.int64]:
    """Logical chunk number that each OUTPUT chunk of `rank` must hold, shape (output_chunks,)."""
    s, op, p = shape(program), base_operation(program.operation), program.num_ranks
    if op in ("reduce_scatter", "scatter"):
        return rank * s.chunks_per_block + np.arange(s.output_chunks)
    if op == "all_to_all":
        part, block = np.arange(s.chunks_per_block), np.arange(p)
        return ((block[:, None] * p + rank) * s.chunks_per_block + part).ravel()
    return np.arange(s.output_chunks)


def defines_input(program: Collective, rank: int) -> bool:
    """Whether `rank` brings an input."""
    return base_operation(program.operation) not in ("broadcast", "scatter") or rank == program.root


def defines_output(program: Collective, rank: int) -> bool:
    """Whether `rank` must hold a result."""
    return base_operation(program.operation) not in ("reduce", "gather") or rank == program.root


def contributors(program: Collective, rank: int) -> npt.NDArray[np.int64]:
    """Postcondition: multiset of contributors of each OUTPUT chunk of `rank`, counts (output_chunks, P).

    Zero where nothing is promised. For barrier the counts are lower bounds.
    """
    s, op, p = shape(program), base_operation(program.operation), program.num_ranks
    counts = np.zeros((s.output_chunks, p), dtype=np.int64)
    if not defines_output(program, rank):
        return counts
    if op in REDUCING:
        counts[:] = 1
    elif op in ("broadcast", "scatter"):
        counts[:, program.root] = 1
    else:
        chunk = np.arange(s.output_chunks)
        counts[chunk, chunk // s.chunks_per_block] = 1
    return counts


def masks(program: Collective, rank: int) -> list[int]:
    """Postcondition of `rank`: `contributors` as one bit set per OUTPUT chunk."""
    s, op = shape(program), base_operation(program.operation)
    if not defines_output(program, rank):
        return [0] * s.output_chunks
    if op in REDUCING:
        return [(1 << program.num_ranks) - 1] * s.output_chunks
    if op in ("broadcast", "scatter"):
        return [1 << program.root] * s.output_chunks
    return [1 << chunk // s.chunks_per_block for chunk in range(s.output_chunks)]


@dataclass(frozen=True)
class CallLayout:
    """Where chunks lie for one call: element offsets of INPUT and OUTPUT chunks on one rank.

    `input_offsets[c]` … `input_offsets[c + 1]` are the elements of INPUT chunk c; the same for OUTPUT.
    """

    input_offsets: npt.NDArray[np.intp]
    output_offsets: npt.NDArray[np.intp]


def layout(program: Collective, rank: int, counts: BlockCounts) -> CallLayout:
    """Offsets of the chunks of `rank` for a call of this size.

    `counts`: number of elements of the whole buffer (all_reduce, reduce, broadcast); of each rank's block,
    shape (P,), or one number for equal blocks (gathers and scatters); elements from rank i to rank j, shape
    (P, P), or one number (all_to_all).
    """
    s, op, p = shape(program), base_operation(program.operation), program.num_ranks
    if op == "barrier":
        counts = 0
    if op in WHOLE:
        offsets = chunk_offsets(int(np.asarray(counts).item()), program.num_chunks)
        return CallLayout(offsets, offsets)
    blocks = np.asarray(counts, dtype=np.intp)
    if op == "all_to_all":
        matrix = np.broadcast_to(blocks, (p, p))
        send, receive = matrix[rank], matrix[:, rank]
    else:
        every = np.broadcast_to(blocks, (p,))
        own = every[rank : rank + 1]
        send = own if op in ("all_gather", "gather") else every
        receive = own if op in ("reduce_scatter", "scatter") else every
    return CallLayout(_offsets(send, s.chunks_per_block), _offsets(receive, s.chunks_per_block))


def _offsets(blocks: npt.NDArray[np.intp], parts: int) -> npt.NDArray[np.intp]:
    sizes = np.concatenate([np.diff(chunk_offsets(int(n), parts)) for n in blocks])
    return np.concatenate([np.zeros(1, dtype=np.intp), np.cumsum(sizes)])
