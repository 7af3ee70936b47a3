"""From a lowered program to the plan that the core runs: chunks become byte ranges of a call's buffers.

`schedule/lowering/lowered.py` documents the instructions; `_core.Plan.add` takes their fields by those names.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from paceline import _core, collectives
from paceline.schedule import contract
from paceline.schedule.lowering.lower import lower
from paceline.schedule.lowering.lowered import POSTS, ChunkRun, Instruction, Lowered
from paceline.schedule.program import SCRATCH, chunk_offsets

CallCounts = int | tuple[int, ...] | tuple[tuple[int, ...], ...]
"""As `contract.layout` takes them, in elements; hashable."""
MessageChunks = tuple[tuple[int, int], ...]
"""(logical chunk, count) of each run of a message."""
MessageKey = tuple[int, int, int, int]
"""(sender, receiver, channel, number)"""
ByteRange = tuple[int, int, int]
"""(buffer, offset, num_bytes)"""


@functools.lru_cache(maxsize=64)
def lowered(
    algorithm: str, operation: str, num_ranks: int, root: int, in_place: bool
) -> tuple[Lowered, Mapping[MessageKey, MessageChunks]]:
    """Lower an algorithm, written as `ring_chunked(segments=4)`, and find what its messages carry.

    ConfigError if the algorithm cannot do this.
    """
    name, options = collectives.parse(algorithm)
    program = lower(
        collectives.build(name, operation, num_ranks, root=root, **options),
        in_place=in_place,
    )
    return program, _messages(program)


@functools.lru_cache(maxsize=256)
def plan(
    algorithm: str,
    operation: str,
    num_ranks: int,
    root: int,
    rank: int,
    in_place: bool,
    counts: CallCounts,
    element_bytes: int,
) -> _core.Plan:
    """Return what `rank` runs for a call of this size.

    Args:
        algorithm: Name and options, as `ring_chunked(segments=4)`.
        operation: all_reduce, broadcast, …
        num_ranks: P.
        root: Root of a rooted operation.
        rank: Whose part of the program.
        in_place: Whether source and output are the same memory.
        counts: Size of the call in elements, as `contract.layout` takes it.
        element_bytes: Size of an element.

    Raises:
        ConfigError: The algorithm does not exist, or cannot do this with its options.
    """
    program, messages = lowered(algorithm, operation, num_ranks, root, in_place)
    sizes = _chunk_sizes(program, counts) * element_bytes
    layout = contract.layout(program, rank, counts)
    offsets = (
        np.asarray(layout.input_offsets) * element_bytes,
        np.asarray(layout.output_offsets) * element_bytes,
    )
    largest = int(sizes.max(initial=0))
    ranges = _ranges(sizes, offsets, largest)
    has_output = contract.defines_output(program, rank) and contract.base_operation(operation) != "barrier"
    resolved = _core.Plan(
        num_ranks=num_ranks,
        scratch_bytes=program.scratch_chunks * largest,
        output_bytes=int(offsets[1][-1]) if has_output else 0,
    )
    for i in program.instructions[rank]:
        chunks = _chunks_of(messages, rank, i)
        resolved.add(
            verb=i.verb,
            lane=i.lane,
            channel=i.channel,
            recv_peer=i.recv_peer,
            send_peer=i.send_peer,
            num_bytes=sum(int(sizes[first : first + count].sum()) for first, count in chunks),
            dst=ranges(i.dst),
            src=ranges(i.src),
            operand=ranges(i.operand),
            deps=i.deps,
        )
    return resolved


def _ranges(
    sizes: npt.NDArray[np.int64], offsets: tuple[npt.NDArray[np.intp], ...], largest: int
) -> Callable[[list[ChunkRun]], list[ByteRange]]:
    """Return the function from runs to byte ranges, for chunks of these sizes and offsets in bytes."""

    def ranges(runs: list[ChunkRun]) -> list[ByteRange]:
        found: list[ByteRange] = []
        for buffer, chunk, logical, count in runs:
            if buffer != SCRATCH:
                num_bytes = int(sizes[logical : logical + count].sum())
                found.append((buffer, int(offsets[buffer][chunk]), num_bytes))
                continue
            for k in range(count):  # every chunk has a place for the largest one
                found.append((buffer, (chunk + k) * largest, int(sizes[logical + k])))
        return found

    return ranges


def _chunk_sizes(program: Lowered, counts: CallCounts) -> npt.NDArray[np.int64]:
    """Elements of every logical chunk."""
    operation, p = contract.base_operation(program.operation), program.num_ranks
    if operation == "barrier":
        return np.zeros(program.num_chunks, dtype=np.int64)
    if operation in contract.WHOLE:
        return np.diff(chunk_offsets(int(np.asarray(counts).item()), program.num_chunks)).astype(np.int64)
    shape = (p, p) if operation == "all_to_all" else (p,)
    blocks = np.broadcast_to(np.asarray(counts, dtype=np.int64), shape).ravel()
    parts = program.chunks_per_block
    return np.concatenate([np.diff(chunk_offsets(int(n), parts)) for n in blocks]).astype(np.int64)


def _messages(program: Lowered) -> dict[MessageKey, MessageChunks]:
    """Find the chunks of every message."""
    messages: dict[MessageKey, MessageChunks] = {}
    waiting = [(r, i) for r, each in enumerate(program.instructions) for i in each if i.verb in POSTS]
    while waiting:
        # An instruction that only forwards a message has the chunks of that message.
        left = []
        for rank, i in waiting:
            runs = i.src or i.dst
            source = (i.recv_peer, rank, i.channel, i.recv_message)
            if i.verb != "recv_send" or runs:
                chunks = _logical(runs)
            elif source in messages:
                chunks = messages[source]
            else:
                left.append((rank, i))
                continue
            messages[rank, i.send_peer, i.channel, i.send_message] = chunks
        assert len(left) < len(waiting), "messages forward each other in a circle"
        waiting = left
    return messages


def _chunks_of(messages: Mapping[MessageKey, MessageChunks], rank: int, i: Instruction) -> MessageChunks:
    """Return the chunks that an instruction moves."""
    if i.recv_peer >= 0:
        return messages[i.recv_peer, rank, i.channel, i.recv_message]
    if i.send_peer >= 0:
        return messages[rank, i.send_peer, i.channel, i.send_message]
    return _logical(i.dst or i.src)


def _logical(runs: list[ChunkRun]) -> MessageChunks:
    return tuple((logical, count) for _, _, logical, count in runs)
