"""First half of verification: are the lists well formed, and do messages pair up?"""

from __future__ import annotations

from dataclasses import dataclass, field

from paceline.errors import ScheduleError
from paceline.schedule import contract
from paceline.schedule.lowering.lowered import POSTS, RECEIVES, VERBS, ChunkRun, Instruction, Lowered
from paceline.schedule.program import INPUT, SCRATCH

_STORES = frozenset({"recv", "recv_reduce", "read", "read_reduce", "copy", "reduce"})
_HAS_SRC = frozenset({"send", "recv_reduce", "recv_reduce_send", "expose", "read_reduce", "copy", "reduce"})
_HAS_OPERAND = frozenset({"read", "read_reduce", "reduce"})


@dataclass(slots=True)
class PostedMessage:
    """One message: who posts it, when the verifier posted and took it (−1: not yet), and its values."""

    sender: Instruction
    posted: int = -1
    taken: int = -1
    payload: list[tuple[int, int]] = field(default_factory=list)


def check_form(lowered: Lowered) -> None:
    """Reject instructions that no executor could run: wrong fields, ranges, lanes or dependencies."""
    shape = contract.shape(lowered)
    if (shape.input_chunks, shape.output_chunks) != (lowered.input_chunks, lowered.output_chunks):
        raise ScheduleError(f"{lowered}: chunk counts do not fit the operation")
    sizes = [lowered.input_chunks, lowered.output_chunks, lowered.scratch_chunks]
    if lowered.in_place:
        sizes[1 if lowered.input_chunks > lowered.output_chunks else 0] = 0
    for rank, instructions in enumerate(lowered.instructions):
        ends: dict[tuple[int, str], tuple[int, int]] = {}
        lanes: dict[tuple[str, int, int], int] = {}
        for index, i in enumerate(instructions):
            why = _malformed(lowered, rank, index, i, sizes) or _lane_broken(i, ends, lanes)
            if why:
                raise ScheduleError(f"{lowered}: rank {rank}, instruction {index} ({i}): {why}")


def _malformed(lowered: Lowered, rank: int, index: int, i: Instruction, sizes: list[int]) -> str:
    p = lowered.num_ranks
    if i.verb not in VERBS:
        return "unknown verb"
    receives, posts = i.verb in RECEIVES, i.verb in POSTS or i.verb == "reclaim"
    if receives != (i.recv_peer >= 0) or posts != (i.send_peer >= 0):
        return "its peers do not fit its verb"
    if i.recv_peer >= p or i.send_peer >= p or rank in (i.recv_peer, i.send_peer):
        return "its peer is no other rank"
    if (i.verb in _HAS_SRC) != bool(i.src) or (i.verb in _HAS_OPERAND) != bool(i.operand):
        return "its operands do not fit its verb"
    if (i.verb in _STORES and not i.dst) or (i.dst and i.verb in ("send", "expose", "reclaim")):
        return "its destination does not fit its verb"
    for runs in (i.dst, i.src, i.operand):
        for buffer, chunk, _, n in runs:
            if n < 1 or chunk < 0 or chunk + n > sizes[buffer]:
                return f"chunks {chunk} to {chunk + n - 1} of buffer {buffer} do not exist"
    if i.dst and not lowered.in_place and any(run[0] == INPUT for run in i.dst):
        return "it writes the input, which is read-only out of place"
    if not contract.defines_output(lowered, rank) and any(run[0] != SCRATCH for run in i.dst):
        return "it writes the output of a rank that has none"
    if not contract.defines_input(lowered, rank) and any(run[0] == INPUT for run in i.src):
        return "it reads the input of a rank that has none"
    lengths = {sum(run[3] for run in runs) for runs in (i.dst, i.src, i.operand) if runs}
    if len(lengths) > 1:
        return f"its operands have different numbers of chunks: {sorted(lengths)}"
    if i.deps and not all(0 <= d < index for d in i.deps):
        return f"it depends on instructions {i.deps}, not all of them before it"
    return ""


def _lane_broken(
    i: Instruction, ends: dict[tuple[int, str], tuple[int, int]], lanes: dict[tuple[str, int, int], int]
) -> str:
    for side, peer in (("receives from", i.recv_peer), ("sends to", i.send_peer)):
        if peer < 0:
            continue
        if ends.setdefault((i.lane, side), (peer, i.channel)) != (peer, i.channel):
            return f"lane {i.lane} {side} two peers"
        if lanes.setdefault((side, peer, i.channel), i.lane) != i.lane:
            return f"two lanes have the connection that {side} rank {peer} on channel {i.channel}"
    return ""


def match(lowered: Lowered) -> dict[tuple[int, int, int, int], PostedMessage]:
    """Pair posts with takes, by (sender, receiver, channel, number); ScheduleError if one has no partner."""
    posts: dict[tuple[int, int, int, int], PostedMessage] = {}
    posted: dict[tuple[int, int, int], int] = {}
    exposed: dict[tuple[int, int, int], int] = {}
    reclaimed: dict[tuple[int, int, int], int] = {}
    for rank, instructions in enumerate(lowered.instructions):
        for index, i in enumerate(instructions):
            if i.send_peer < 0:
                continue
            key = (rank, i.send_peer, i.channel)
            if i.verb == "reclaim":
                if not 0 <= i.send_message < posted.get(key, 0):
                    _refuse(lowered, rank, index, i, "reclaims a message that it has not posted")
                reclaimed[key] = max(i.send_message, reclaimed.get(key, -1))
                continue
            if i.send_message != posted.get(key, 0):
                _refuse(lowered, rank, index, i, f"posts out of order; message {posted.get(key, 0)} is next")
            posted[key] = i.send_message + 1
            posts[(*key, i.send_message)] = PostedMessage(i)
            if i.verb == "expose":
                exposed[key] = i.send_message
    _match_takes(lowered, posts, posted)
    for key, last in exposed.items():
        if reclaimed.get(key, -1) < last:
            raise ScheduleError(
                f"{lowered}: rank {key[0]} finishes while rank {key[1]} may still read what it exposed in "
                f"message {last}: a reclaim is missing"
            )
    return posts


def _match_takes(
    lowered: Lowered,
    posts: dict[tuple[int, int, int, int], PostedMessage],
    posted: dict[tuple[int, int, int], int],
) -> None:
    taken: dict[tuple[int, int, int], int] = {}
    for rank, instructions in enumerate(lowered.instructions):
        for index, i in enumerate(instructions):
            if i.recv_peer < 0:
                continue
            key = (i.recv_peer, rank, i.channel)
            if i.recv_message != taken.get(key, 0):
                _refuse(lowered, rank, index, i, f"takes out of order; message {taken.get(key, 0)} is next")
            taken[key] = i.recv_message + 1
            post = posts.get((*key, i.recv_message))
            if post is None:
                _refuse(lowered, rank, index, i, "waits for a message that is never sent")
            elif (post.sender.verb == "expose") != i.verb.startswith("read"):
                _refuse(lowered, rank, index, i, f"takes what was posted by {post.sender}")
            elif i.operand and i.operand != post.sender.src:
                _refuse(lowered, rank, index, i, f"reads other memory than {post.sender} exposes")
            elif _logical(i.dst or i.src) != _logical(post.sender.src or post.sender.dst) and (
                (i.dst or i.src) and (post.sender.src or post.sender.dst)
            ):
                _refuse(lowered, rank, index, i, f"takes other chunks than {post.sender} sends")
    for key, n in posted.items():
        if taken.get(key, 0) != n:
            raise ScheduleError(
                f"{lowered}: rank {key[0]} sends {n} messages to rank {key[1]} on channel {key[2]}, "
                f"which takes {taken.get(key, 0)}"
            )


def _logical(runs: list[ChunkRun]) -> list[int]:
    return [logical + k for _, _, logical, n in runs for k in range(n)]


def _refuse(lowered: Lowered, rank: int, index: int, i: Instruction, why: str) -> None:
    raise ScheduleError(f"{lowered}: rank {rank}, instruction {index} ({i}) {why}")
