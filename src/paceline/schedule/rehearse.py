"""Runs a lowered program on NumPy arrays: every rank's list in order, as a one-thread executor would.

The second oracle for executors, instruction by instruction; `interpret` is the first, step by step. Both give
the same bits for any dtype and operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from paceline.errors import ScheduleError
from paceline.schedule import contract
from paceline.schedule.interpret import COMBINE, Counts, divide
from paceline.schedule.lowered import POSTS, Instruction, Lowered, Run
from paceline.types import ReduceOp

Array = npt.NDArray[Any]


def rehearse(
    lowered: Lowered, inputs: Sequence[Array | None], *, counts: Counts, op: ReduceOp = ReduceOp.SUM
) -> list[Array | None]:
    """Each rank's result (None where none is promised); arguments as of `interpret`."""
    stage = _Stage(lowered, inputs, counts, op)
    stage.run()
    return [stage.result(rank) for rank in range(lowered.num_ranks)]


class _Stage:
    def __init__(
        self, lowered: Lowered, inputs: Sequence[Array | None], counts: Counts, op: ReduceOp
    ) -> None:
        self._low, self._op, self._combine = lowered, op, COMBINE[op]
        self._dtype = next(v.dtype for v in inputs if v is not None)
        p = lowered.num_ranks
        self._layouts = [contract.layout(lowered, rank, counts) for rank in range(p)]  # type: ignore[arg-type]
        self._memory: list[dict[tuple[int, int], Array]] = [{} for _ in range(p)]
        self._messages: dict[tuple[int, int, int, int], list[Array]] = {}
        self._acknowledged: dict[tuple[int, int, int], int] = {}
        inside = lowered.in_place and lowered.input_chunks < lowered.output_chunks
        buffer = 1 if lowered.in_place and lowered.input_chunks <= lowered.output_chunks else 0
        for rank, values in enumerate(inputs):
            if values is None or not contract.defines_input(lowered, rank):
                continue
            offset = contract.in_place_offset(lowered, rank) if inside else 0
            cuts = self._layouts[rank].input_offsets
            for chunk, part in enumerate(np.split(values, cuts[1:-1])):
                self._memory[rank][buffer, offset + chunk] = part

    def run(self) -> None:
        """Let every rank run as far as it can until all are done."""
        lists = self._low.instructions
        at = [0] * len(lists)
        moved = True
        while moved:
            moved = False
            for rank, mine in enumerate(lists):
                while at[rank] < len(mine) and self._try(rank, mine[at[rank]]):
                    at[rank] += 1
                    moved = True
        if any(n < len(mine) for n, mine in zip(at, lists, strict=True)):
            raise ScheduleError(f"{self._low}: deadlock at instructions {at}")

    def _try(self, rank: int, i: Instruction) -> bool:
        """Run `i` unless it has to wait."""
        send, recv = (rank, i.send_peer, i.channel), (i.recv_peer, rank, i.channel)
        if i.recv_peer >= 0 and (*recv, i.recv_message) not in self._messages:
            return False
        needed = i.send_message if i.verb == "reclaim" else i.send_message - self._low.slots
        if i.send_peer >= 0 and self._acknowledged.get(send, 0) <= needed:
            return False
        if i.verb == "reclaim":
            return True
        own = self._load(rank, i.src)
        incoming = self._messages.pop((*recv, i.recv_message)) if i.recv_peer >= 0 else own
        if i.far:
            incoming = self._load(i.recv_peer if i.recv_peer >= 0 else rank, i.far)
        if "reduce" in i.verb:
            incoming = [self._combine(a, b) for a, b in zip(own, incoming, strict=True)]
        if i.dst:
            self._store(rank, i.dst, incoming)
        if i.recv_peer >= 0:
            self._acknowledged[recv] = i.recv_message + 1
        if i.verb in POSTS:
            self._messages[*send, i.send_message] = incoming
        return True

    def _load(self, rank: int, runs: list[Run]) -> list[Array]:
        memory = self._memory[rank]
        return [memory[buffer, chunk + k] for buffer, chunk, _, n in runs for k in range(n)]

    def _store(self, rank: int, runs: list[Run], values: list[Array]) -> None:
        places = [(buffer, chunk + k) for buffer, chunk, _, n in runs for k in range(n)]
        self._memory[rank].update(zip(places, values, strict=True))

    def result(self, rank: int) -> Array | None:
        """OUTPUT of `rank`."""
        low = self._low
        if not contract.defines_output(low, rank):
            return None
        buffer, offset = 1, 0
        if low.in_place and low.input_chunks > low.output_chunks:
            buffer, offset = 0, contract.in_place_offset(low, rank)
        parts = [self._memory[rank][buffer, offset + c] for c in range(low.output_chunks)]
        whole: Array = np.concatenate([np.zeros(0, self._dtype), *parts])
        return divide(whole, low.num_ranks) if self._op is ReduceOp.MEAN else whole
