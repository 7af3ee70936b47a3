"""The lowered program: the list of instructions that every rank executes, and the words for them.

This is the one description of the format. `lower` makes it, `verification` proves it, `comm/native/plan.py`
turns its chunks into byte ranges, and csrc/core/network/plan.h and execute.cpp run it. All use these words.

Each rank has one ordered list of instructions. An executor may run it in order with one thread, or let the
rank's *lanes* advance independently: a lane is the sub-list of instructions with that lane number, always
run in order; it has at most one peer to receive from and one to send to. Across lanes of a rank only `deps`
order anything: an instruction starts when all instructions in `deps` (indices into the same rank's list)
are done. `deps` are transitively reduced over lanes, messages and acknowledgements of all ranks, so dropping
any of them allows a race. `verify` proves the lists race-free under lanes and deadlock-free in list order.

Connections. Messages from one rank to another on one channel are numbered from 0 and taken in this order.
At most `slots` of them may be posted and not yet acknowledged: posting message n waits until message
n − slots is acknowledged (the release and acquire of two counters per connection).

| verb             | waits for            | does                             | then                         |
|------------------|----------------------|----------------------------------|------------------------------|
| send             | a free slot          | slot = src                       | posts                        |
| recv             | the message          | dst = slot                       | acknowledges                 |
| recv_reduce      | the message          | dst = src (op) slot              | acknowledges                 |
| recv_send        | message, free slot   | next slot = slot [and dst]       | acknowledges, posts          |
| recv_reduce_send | message, free slot   | next slot = src (op) slot [dst]  | acknowledges, posts          |
| copy             | —                    | dst = src                        |                              |
| reduce           | —                    | dst = src (op) operand           |                              |
| expose           | a free slot          | nothing: src stays in place      | posts; the peer reads src    |
| read             | the message          | dst = operand                    | acknowledges                 |
| read_reduce      | the message          | dst = src (op) operand           | acknowledges                 |
| reclaim          | ack. of `send_message` | nothing: exposed memory is free again |                       |

`src` is memory of the rank itself. So is `operand` of reduce; `operand` of read and read_reduce is memory of
`recv_peer`. `dst` may be empty for the two forwarding verbs: nothing is stored. Peers and message numbers are
−1 where a verb has none.

Executed and modelled. The C++ executor runs the first seven verbs (EXECUTED), over a network between hosts
that have one rank each. The last four (MODELLED) appear only in zero-copy forms, where every rank would
address its peers' buffers: they are proved and can be rehearsed, but no executor runs them yet.

Runs. `dst`, `src` and `operand` are lists of runs (buffer, chunk, logical, count): `count` neighbouring
chunks from `chunk` of buffer 0 INPUT, 1 OUTPUT or 2 SCRATCH, which hold the logical chunks `logical`,
`logical` + 1 … A message is the concatenation of its chunks. The size of a chunk is that of its logical chunk
(`contract.logical_input`): for all_to_all block logical div chunks_per_block is (source·P + destination),
otherwise the block itself; `program.chunk_offsets` cuts a block into its chunks. INPUT and OUTPUT chunks lie
next to one another; SCRATCH chunk c starts at c · (size of the largest logical chunk). An in-place program
names each piece of memory once, by the larger of INPUT and OUTPUT (OUTPUT if equal).

Plans. For one call `plan.py` replaces the runs by ranges (buffer, offset, num_bytes), adds `num_bytes`, the
size of the message or of what is moved locally, and leaves out the message numbers: the executor takes the
messages of a connection in order. All other fields go to C++ as they are, by name.

Slices. An executor may cut every chunk into slices by the same rule and run an instruction slice by slice,
waiting and posting per slice; a dependency may then be awaited slice by slice too. `slots` counts whole
messages, so there must be room for the slices of `slots` messages. What is proved holds for any number of
slices.

Mean is a sum whose result is divided by the number of ranks when the list is done.
"""

from __future__ import annotations

from dataclasses import dataclass, field

EXECUTED = ("send", "recv", "recv_reduce", "recv_send", "recv_reduce_send", "copy", "reduce")
"""Verbs that the C++ executor runs."""
MODELLED = ("expose", "read", "read_reduce", "reclaim")
"""Verbs of zero-copy forms, which are proved but have no executor."""
VERBS = EXECUTED + MODELLED
RECEIVES = frozenset({"recv", "recv_reduce", "recv_send", "recv_reduce_send", "read", "read_reduce"})
"""Verbs that take a message."""
POSTS = frozenset({"send", "recv_send", "recv_reduce_send", "expose"})
"""Verbs that post a message."""

ChunkRun = tuple[int, int, int, int]
"""(buffer, chunk, logical, count)"""


@dataclass(slots=True)
class Instruction:
    """One line of a rank's list; the module's docstring explains every field."""

    verb: str
    lane: int = 0
    channel: int = 0
    recv_peer: int = -1
    recv_message: int = -1
    send_peer: int = -1
    send_message: int = -1
    dst: list[ChunkRun] = field(default_factory=list)
    src: list[ChunkRun] = field(default_factory=list)
    operand: list[ChunkRun] = field(default_factory=list)
    deps: list[int] = field(default_factory=list)
    step: int = -1
    """Step of the Program that it comes from, for error messages only."""

    def __str__(self) -> str:
        parts = [self.verb]
        if self.recv_peer >= 0:
            parts.append(f"from rank {self.recv_peer} (message {self.recv_message})")
        if self.send_peer >= 0:
            parts.append(f"to rank {self.send_peer} (message {self.send_message})")
        names = ("input", "output", "scratch")
        for label, runs in (("dst", self.dst), ("src", self.src), ("operand", self.operand)):
            if runs:
                cells = ", ".join(f"{names[b]}[{c}{f'–{c + n - 1}' if n > 1 else ''}]" for b, c, _, n in runs)
                parts.append(f"{label} {cells}")
        return " ".join(parts)


@dataclass
class Lowered:
    """A program as P ranks execute it. `instructions[r]` is rank r's list.

    `scratch_chunks`: how many chunks of SCRATCH each rank needs. `slots`: messages in flight per connection.
    `chunks_per_block`, `input_chunks`, `output_chunks`: see `contract.Shape`.
    """

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
    in_place: bool
    zero_copy: bool
    instructions: list[list[Instruction]]

    def __str__(self) -> str:
        place = "in place" if self.in_place else "out of place"
        copying = "zero-copy" if self.zero_copy else "staged"
        return f"{self.algorithm} {self.operation} on {self.num_ranks} ranks ({place}, {copying})"

    @property
    def is_executable(self) -> bool:
        """Whether the C++ executor runs every verb in it."""
        return all(i.verb in EXECUTED for instructions in self.instructions for i in instructions)
