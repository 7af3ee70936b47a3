"""From a lowered program to what the core runs: runs of chunks become byte ranges of a call's buffers."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from paceline import _core, collectives
from paceline.schedule import contract
from paceline.schedule.lowering.lower import lower
from paceline.schedule.lowering.lowered import POSTS, VERBS, Instruction, Lowered, Run
from paceline.schedule.program import chunk_offsets

Message = tuple[tuple[int, int], ...]
"""(logical chunk, count) of each run of a message."""


@functools.lru_cache(maxsize=64)
def lowered(algorithm: str, operation: str, num_ranks: int, root: int, in_place: bool) -> Lowered:
    """Lower an algorithm, written as `ring_chunked(segments=4)`; ConfigError if it cannot do this."""
    name, options = collectives.parse(algorithm)
    program = collectives.build(name, operation, num_ranks, root=root, **options)
    return lower(program, in_place=in_place)


@functools.lru_cache(maxsize=256)
def plan(
    algorithm: str,
    operation: str,
    num_ranks: int,
    root: int,
    rank: int,
    in_place: bool,
    counts: int | tuple[int, ...] | tuple[tuple[int, ...], ...],
    element_bytes: int,
) -> _core.Plan:
    """What `rank` runs; `counts` as in `contract.layout`, in elements."""
    program = lowered(algorithm, operation, num_ranks, root, in_place)
    sizes = _chunk_sizes(program, counts) * element_bytes
    layout = contract.layout(program, rank, counts)
    offsets = (
        np.asarray(layout.input_offsets) * element_bytes,
        np.asarray(layout.output_offsets) * element_bytes,
    )
    largest = int(sizes.max(initial=0))

    def pieces(runs: list[Run]) -> list[int]:
        words: list[int] = []
        for buffer, chunk, logical, count in runs:
            if buffer < 2:
                words += (buffer, int(offsets[buffer][chunk]), int(sizes[logical : logical + count].sum()))
            else:
                for k in range(count):
                    words += (buffer, (chunk + k) * largest, int(sizes[logical + k]))
        return words

    messages = _messages(program)
    has_output = contract.defines_output(program, rank) and contract.base_operation(operation) != "barrier"
    output_bytes = int(offsets[1][-1]) if has_output else 0
    instructions = program.instructions[rank]
    words = [program.scratch_chunks * largest, output_bytes, program.num_lanes(rank), len(instructions)]
    for i in instructions:
        shape = _message_of(messages, rank, i)
        num_bytes = sum(int(sizes[a : a + n].sum()) for a, n in shape)
        lists = [pieces(runs) for runs in (i.dst, i.src, i.far)]
        words += [VERBS.index(i.verb), i.lane, i.channel, i.recv_peer, i.send_peer, num_bytes]
        words += [*(len(x) // 3 for x in lists), len(i.deps), *lists[0], *lists[1], *lists[2], *i.deps]
    return _core.Plan(words, num_ranks)


def _chunk_sizes(program: Lowered, counts: object) -> npt.NDArray[np.int64]:
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


_known: dict[int, tuple[Lowered, dict[tuple[int, int, int, int], Message]]] = {}


def _messages(program: Lowered) -> dict[tuple[int, int, int, int], Message]:
    """The chunks of every message by (sender, receiver, channel, number)."""
    found = _known.get(id(program))
    if found is not None:
        return found[1]
    messages: dict[tuple[int, int, int, int], Message] = {}
    waiting = [(r, i) for r, each in enumerate(program.instructions) for i in each if i.verb in POSTS]
    while waiting:
        # What only forwards has the chunks of the message that it forwards.
        left = []
        for rank, i in waiting:
            runs = i.src or i.dst
            source = (i.recv_peer, rank, i.channel, i.recv_message)
            if i.verb != "recv_send" or runs:
                shape = tuple((logical, count) for _, _, logical, count in runs)
            elif source in messages:
                shape = messages[source]
            else:
                left.append((rank, i))
                continue
            messages[rank, i.send_peer, i.channel, i.send_message] = shape
        assert len(left) < len(waiting), "messages forward each other in a circle"
        waiting = left
    _known[id(program)] = (program, messages)
    return messages


def _message_of(messages: dict[tuple[int, int, int, int], Message], rank: int, i: Instruction) -> Message:
    if i.recv_peer >= 0:
        return messages[i.recv_peer, rank, i.channel, i.recv_message]
    if i.send_peer >= 0:
        return messages[rank, i.send_peer, i.channel, i.send_message]
    return tuple((logical, count) for _, _, logical, count in (i.dst or i.src))
