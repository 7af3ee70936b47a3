"""Runs a lowered program on NumPy arrays, as executors do: in list order, or lanes in any order, in slices.

This is the second oracle for executors, instruction by instruction; `interpret` is the first, step by step.
Both give the same bits for any dtype and operation, and so does any order that lanes and dependencies allow.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from paceline.errors import ScheduleError
from paceline.schedule import contract
from paceline.schedule.interpret import COMBINE, divide
from paceline.schedule.lowering.lowered import POSTS, ChunkRun, Instruction, Lowered
from paceline.schedule.program import chunk_offsets
from paceline.types import ReduceOp

Array = npt.NDArray[Any]


def rehearse(
    lowered: Lowered,
    inputs: Sequence[Array | None],
    *,
    counts: contract.BlockCounts,
    op: ReduceOp = ReduceOp.SUM,
    draw: random.Random | None = None,
    slices: int = 1,
) -> list[Array | None]:
    """Return each rank's result (None where none is promised); other arguments as of `interpret`.

    Without `draw` every rank runs its list in order. With it, lanes advance independently, one slice of one
    instruction at a time, in an order drawn at random: the freest execution that the format allows. Every
    chunk is cut into `slices`.
    """
    rehearsal = _Rehearsal(lowered, inputs, counts, op, is_free=draw is not None, slices=slices)
    rehearsal.run(draw)
    return [rehearsal.result(rank) for rank in range(lowered.num_ranks)]


class _Thread:
    """Instructions of one rank that run in order: its whole list, or one lane of it."""

    def __init__(self, rank: int, indices: list[int]) -> None:
        self.rank, self.indices = rank, indices
        self.at = self.slice = 0


class _Rehearsal:
    def __init__(
        self,
        lowered: Lowered,
        inputs: Sequence[Array | None],
        counts: contract.BlockCounts,
        op: ReduceOp,
        *,
        is_free: bool,
        slices: int,
    ) -> None:
        self._low, self._op, self._combine, self._slices = lowered, op, COMBINE[op], slices
        self._dtype = next(v.dtype for v in inputs if v is not None)
        p = lowered.num_ranks
        self._layouts = [contract.layout(lowered, rank, counts) for rank in range(p)]
        self._memory: list[dict[tuple[int, int, int], Array]] = [{} for _ in range(p)]
        self._messages: dict[tuple[int, int, int, int], list[Array]] = {}
        self._acknowledged: dict[tuple[int, int, int], int] = {}
        self._finished = [[0] * len(mine) for mine in lowered.instructions]  # slices done
        self._threads = [t for rank in range(p) for t in self._threads_of(rank, is_free)]
        inside = lowered.in_place and lowered.input_chunks < lowered.output_chunks
        buffer = 1 if lowered.in_place and lowered.input_chunks <= lowered.output_chunks else 0
        for rank, values in enumerate(inputs):
            if values is None or not contract.defines_input(lowered, rank):
                continue
            offset = contract.in_place_offset(lowered, rank) if inside else 0
            cuts = self._layouts[rank].input_offsets
            for chunk, part in enumerate(np.split(values, cuts[1:-1])):
                for s, piece in enumerate(np.split(part, chunk_offsets(part.size, slices)[1:-1])):
                    self._memory[rank][buffer, offset + chunk, s] = piece

    def _threads_of(self, rank: int, is_free: bool) -> list[_Thread]:
        mine = self._low.instructions[rank]
        if not is_free:
            return [_Thread(rank, list(range(len(mine))))]
        lanes = sorted({i.lane for i in mine})
        return [_Thread(rank, [k for k, i in enumerate(mine) if i.lane == lane]) for lane in lanes]

    def run(self, draw: random.Random | None) -> None:
        """Let threads run until all are done."""
        running = [t for t in self._threads if t.indices]
        idle = 0
        while running:
            thread = draw.choice(running) if draw else running[0]
            if self._advance(thread):
                idle = 0
            elif (idle := idle + 1) > 50 * len(running):
                where = [(t.rank, t.indices[t.at]) for t in running]
                raise ScheduleError(f"{self._low}: deadlock at (rank, instruction) {where}")
            elif not draw:
                running.append(running.pop(0))
            if thread.at == len(thread.indices):
                running.remove(thread)

    def _advance(self, thread: _Thread) -> bool:
        """Run the next slice of a thread's instruction unless it has to wait."""
        index, finished = thread.indices[thread.at], self._finished[thread.rank]
        i = self._low.instructions[thread.rank][index]
        if any(finished[d] <= thread.slice for d in i.deps) or not self._try(thread.rank, i, thread.slice):
            return False
        finished[index] += 1
        thread.slice += 1
        if thread.slice == self._slices:
            thread.at, thread.slice = thread.at + 1, 0
        return True

    def _try(self, rank: int, i: Instruction, s: int) -> bool:
        """Run slice s of `i` unless it has to wait. Messages and acknowledgements are counted in slices."""
        low = self._low
        send, recv = (rank, i.send_peer, i.channel), (i.recv_peer, rank, i.channel)
        incoming_number, outgoing_number = (
            i.recv_message * self._slices + s,
            i.send_message * self._slices + s,
        )
        if i.recv_peer >= 0 and (*recv, incoming_number) not in self._messages:
            return False
        needed = outgoing_number - (0 if i.verb == "reclaim" else low.slots * self._slices)
        if i.send_peer >= 0 and self._acknowledged.get(send, 0) <= needed:
            return False
        if i.verb == "reclaim":
            return True
        own = self._load(rank, i.src, s)
        incoming = self._messages.pop((*recv, incoming_number)) if i.recv_peer >= 0 else own
        if i.operand:
            incoming = self._load(i.recv_peer if i.recv_peer >= 0 else rank, i.operand, s)
        if "reduce" in i.verb:
            incoming = [self._combine(a, b) for a, b in zip(own, incoming, strict=True)]
        if i.dst:
            places = [(buffer, chunk + k, s) for buffer, chunk, _, n in i.dst for k in range(n)]
            self._memory[rank].update(zip(places, incoming, strict=True))
        if i.recv_peer >= 0:
            self._acknowledged[recv] = incoming_number + 1
        if i.verb in POSTS:
            self._messages[(*send, outgoing_number)] = incoming
        return True

    def _load(self, rank: int, runs: list[ChunkRun], s: int) -> list[Array]:
        memory = self._memory[rank]
        return [memory[buffer, chunk + k, s] for buffer, chunk, _, n in runs for k in range(n)]

    def result(self, rank: int) -> Array | None:
        """Return the OUTPUT of `rank`."""
        low = self._low
        if not contract.defines_output(low, rank):
            return None
        buffer, offset = 1, 0
        if low.in_place and low.input_chunks > low.output_chunks:
            buffer, offset = 0, contract.in_place_offset(low, rank)
        places = [(buffer, offset + c, s) for c in range(low.output_chunks) for s in range(self._slices)]
        whole: Array = np.concatenate([np.zeros(0, self._dtype), *(self._memory[rank][p] for p in places)])
        return divide(whole, low.num_ranks) if self._op is ReduceOp.MEAN else whole
