"""The lowered program: what every rank really executes, and its JSON and binary forms (version 1).

Each rank has one ordered list of instructions. An executor may run it in order with one thread, or let the
rank's *lanes* advance independently: a lane is the sub-list of instructions with that lane number, always
run in order; it has at most one peer to receive from and one to send to. Across lanes of a rank only `deps`
order anything: an instruction starts when all instructions in `deps` (indices into the same rank's list)
are done. `deps` are transitively reduced over lanes, messages and acknowledgements of all ranks, so dropping
any of them allows a race. `verify` proves the lists race-free under lanes and deadlock-free in list order.

Connections. Messages from one rank to another on one channel are numbered from 0 and taken in this order.
At most `slots` of them may be posted and not yet acknowledged: posting message n waits until message
n − slots is acknowledged (the release and acquire of two counters per connection).

| verb             | waits for            | does                           | then                           |
|------------------|----------------------|--------------------------------|--------------------------------|
| send             | a free slot          | slot = src                     | posts                          |
| recv             | the message          | dst = slot                     | acknowledges                   |
| recv_reduce      | the message          | dst = src (op) slot            | acknowledges                   |
| recv_send        | message, free slot   | next slot = slot [and dst]     | acknowledges, posts            |
| recv_reduce_send | message, free slot   | next slot = src (op) slot [dst]| acknowledges, posts            |
| expose           | a free slot          | nothing: src stays in place    | posts; the peer reads src      |
| read             | the message          | dst = peer's far               | acknowledges                   |
| read_reduce      | the message          | dst = src (op) peer's far      | acknowledges                   |
| reclaim          | ack. of `send_message` | nothing: exposed memory is ours |                           |
| copy             | —                    | dst = src                      |                                |
| reduce           | —                    | dst = src (op) far, both local |                                |

`dst` may be empty for the two forwarding verbs: nothing is stored. `expose`, `read` and `reclaim` appear only
in zero-copy programs, where every rank can address its peers' buffers.

Runs. `dst`, `src` and `far` are lists of runs (buffer, chunk, logical, count): `count` neighbouring chunks
from `chunk` of buffer 0 INPUT, 1 OUTPUT or 2 SCRATCH, which hold the logical chunks `logical`,
`logical` + 1 … A message is the concatenation of its chunks. The size of a chunk is that of its logical
chunk (`contract.logical_input`): for all_to_all block logical div chunks_per_block is (source·P +
destination), otherwise the block itself; `program.chunk_offsets` cuts a block into its chunks. INPUT and
OUTPUT chunks lie next to one another; SCRATCH chunk c starts at c · (size of the largest logical chunk).
An in-place program names each piece of memory once, by the larger of INPUT and OUTPUT (OUTPUT if equal).

Slices. An executor may cut every chunk in `slices` parts by the same rule and run an instruction slice by
slice, waiting and posting per slice; a dependency may then be awaited slice by slice too. `slots` counts
whole messages, so it must have room for slots × slices slices. Proved once, that holds for any number.

Mean is a sum whose result is divided by the number of ranks when the list is done.

Binary form of one rank: little-endian 32-bit signed words.
    magic 0x50_4C_53_43, version, operation (index in contract.OPERATIONS), num_ranks, rank, root,
    num_chunks, chunks_per_block, input_chunks, output_chunks, scratch_chunks, num_channels, num_lanes,
    slots, slices, in_place, zero_copy, number of instructions; then for each instruction
    verb (index in VERBS), lane, channel, recv_peer, recv_message, send_peer, send_message (−1: none),
    len(dst), len(src), len(far), len(deps), the runs of dst, src and far (4 words each), deps.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from paceline.errors import ScheduleError
from paceline.schedule.contract import OPERATIONS

VERSION = 1
MAGIC = 0x504C5343
VERBS = (
    "send",
    "recv",
    "recv_reduce",
    "recv_send",
    "recv_reduce_send",
    "expose",
    "read",
    "read_reduce",
    "reclaim",
    "copy",
    "reduce",
)
RECEIVES = frozenset({"recv", "recv_reduce", "recv_send", "recv_reduce_send", "read", "read_reduce"})
POSTS = frozenset({"send", "recv_send", "recv_reduce_send", "expose"})

Run = tuple[int, int, int, int]
"""(buffer, chunk, logical, count)"""


@dataclass(slots=True)
class Instruction:
    """One line of a rank's list; see the table above. Peers and message numbers are −1 where unused."""

    verb: str
    lane: int = 0
    channel: int = 0
    recv_peer: int = -1
    recv_message: int = -1
    send_peer: int = -1
    send_message: int = -1
    dst: list[Run] = field(default_factory=list)
    src: list[Run] = field(default_factory=list)
    far: list[Run] = field(default_factory=list)
    deps: list[int] = field(default_factory=list)
    step: int = -1
    """Step of the Program it comes from; for messages and drawings only, not part of the binary form."""

    def __str__(self) -> str:
        parts = [self.verb]
        if self.recv_peer >= 0:
            parts.append(f"from rank {self.recv_peer} (message {self.recv_message})")
        if self.send_peer >= 0:
            parts.append(f"to rank {self.send_peer} (message {self.send_message})")
        names = ("input", "output", "scratch")
        for label, runs in (("dst", self.dst), ("src", self.src), ("far", self.far)):
            if runs:
                cells = ", ".join(f"{names[b]}[{c}{f'–{c + n - 1}' if n > 1 else ''}]" for b, c, _, n in runs)
                parts.append(f"{label} {cells}")
        return " ".join(parts)


@dataclass
class Lowered:
    """A program as P ranks execute it. `instructions[r]` is rank r's list."""

    algorithm: str
    operation: str
    num_ranks: int
    root: int
    num_chunks: int
    chunks_per_block: int
    input_chunks: int
    output_chunks: int
    scratch_chunks: int
    num_channels: int
    slots: int
    slices: int
    in_place: bool
    zero_copy: bool
    instructions: list[list[Instruction]]

    def __str__(self) -> str:
        place = "in place" if self.in_place else "out of place"
        copying = "zero-copy" if self.zero_copy else "staged"
        return f"{self.algorithm} {self.operation} on {self.num_ranks} ranks ({place}, {copying})"

    def num_lanes(self, rank: int) -> int:
        """How many lanes `rank` has."""
        return 1 + max((i.lane for i in self.instructions[rank]), default=-1)

    def to_json(self, rank: int) -> str:
        """One rank's list as JSON: the header's fields and one object per instruction."""
        body = [{k: getattr(i, k) for k in Instruction.__slots__} for i in self.instructions[rank]]
        names = [n for n in self.__dataclass_fields__ if n != "instructions"]
        head: dict[str, Any] = {"version": VERSION, "rank": rank, **{n: getattr(self, n) for n in names}}
        return json.dumps({**head, "num_lanes": self.num_lanes(rank), "instructions": body})

    def to_bytes(self, rank: int) -> bytes:
        """One rank's list in the binary form."""
        words: list[int] = [MAGIC, VERSION, OPERATIONS.index(self.operation), self.num_ranks, rank, self.root]
        words += [self.num_chunks, self.chunks_per_block, self.input_chunks, self.output_chunks]
        words += [self.scratch_chunks, self.num_channels, self.num_lanes(rank), self.slots, self.slices]
        words += [int(self.in_place), int(self.zero_copy), len(self.instructions[rank])]
        for i in self.instructions[rank]:
            words += [VERBS.index(i.verb), i.lane, i.channel, i.recv_peer, i.recv_message]
            words += [i.send_peer, i.send_message, len(i.dst), len(i.src), len(i.far), len(i.deps)]
            for run in (*i.dst, *i.src, *i.far):
                words += run
            words += i.deps
        return np.array(words, dtype="<i4").tobytes()


def from_bytes(lists: list[bytes], *, algorithm: str = "") -> Lowered:
    """Read the binary forms of ranks 0 … P−1 back; ScheduleError if they are not one program."""
    heads, instructions = [], []
    for rank, data in enumerate(lists):
        words = np.frombuffer(data, dtype="<i4").tolist()
        if len(words) < 18 or words[0] != MAGIC or words[1] != VERSION:
            raise ScheduleError(f"rank {rank}: not a lowered program of version {VERSION}")
        if words[4] != rank or words[3] != len(lists):
            raise ScheduleError(f"list {rank} of {len(lists)} is of rank {words[4]} of {words[3]}")
        heads.append(words[2:4] + words[5:12] + words[13:17])
        instructions.append(_read_instructions(words, rank))
    if any(h != heads[0] for h in heads):
        raise ScheduleError("the ranks' lists are of different programs")
    op, p, root, chunks, block, inputs, outputs, scratch, channels, slots, slices, place, zero = heads[0]
    sizes = (chunks, block, inputs, outputs, scratch, channels, slots, slices)
    return Lowered(algorithm, OPERATIONS[op], p, root, *sizes, bool(place), bool(zero), instructions)


def _read_instructions(words: list[int], rank: int) -> list[Instruction]:
    found, at = [], 18
    try:
        for _ in range(words[17]):
            verb, lane, channel, recv, recv_n, send, send_n, *lengths = words[at : at + 11]
            at += 11
            runs: list[list[Run]] = []
            for n in lengths[:3]:
                runs.append([(*words[at + 4 * k : at + 4 * k + 4],) for k in range(n)])  # type: ignore[misc]
                at += 4 * n
            deps = words[at : at + lengths[3]]
            at += lengths[3]
            found.append(
                Instruction(
                    VERBS[verb], lane, channel, recv, recv_n, send, send_n, runs[0], runs[1], runs[2], deps
                )
            )
    except (IndexError, ValueError):
        raise ScheduleError(f"rank {rank}: lowered program cut off at word {at}") from None
    if at != len(words):
        raise ScheduleError(f"rank {rank}: {len(words) - at} words after the last instruction")
    return found
