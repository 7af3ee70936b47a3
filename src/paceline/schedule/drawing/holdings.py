"""What every rank holds before and after each step of a small program, for drawings and explanations.

The whole state is kept (ranks × chunks × contributors), so this suits tens of ranks, not thousands. Whether a
program is correct is for the verifier to say.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from paceline.schedule import contract
from paceline.schedule.program import COPY, Program, Step
from paceline.schedule.topology import FloatArray, IntArray

NOTHING = -1


@dataclass(frozen=True)
class Moment:
    """One step, with what it moves and what the ranks hold once it is done.

    `logical`: for each transfer the logical numbers of its chunks (see `contract.logical_input`). `complete`:
    shape (P, cells), for each cell the largest share of the needed contributors that the rank holds. A cell
    is a chunk of the whole buffer, or for all_to_all a chunk of a block from another rank to this one.
    """

    step: Step
    logical: tuple[tuple[int, ...], ...]
    complete: FloatArray


class Holdings:
    """Contributors of every chunk on every rank, moved step by step."""

    def __init__(self, program: Program) -> None:
        p = program.num_ranks
        self._program = program
        self._width = 2 * program.num_chunks + program.num_scratch
        self._logical = np.full((p, self._width), NOTHING, dtype=np.intp)
        self._counts = np.zeros((p, self._width, p), dtype=np.int64)
        for r in range(p):
            if contract.defines_input(program, r):
                numbers = contract.logical_input(program, r)
                self._logical[r, : len(numbers)] = numbers
                self._counts[r, : len(numbers), r] = 1

    def walk(self) -> Iterator[Moment]:
        """Yield every step in order, local ones too."""
        for step in self._program.steps():
            moved = self._move(step)
            yield Moment(step, moved, self.complete())

    def complete(self) -> FloatArray:
        """Share of the needed contributors, shape (P, cells)."""
        program, p = self._program, self._program.num_ranks
        operation = contract.base_operation(program.operation)
        needed = p if operation in contract.REDUCING else 1
        share = np.minimum((self._counts > 0).sum(axis=2), needed) / needed
        cells = program.num_chunks
        result = np.zeros((p, cells))
        for r in range(p):
            held = self._logical[r] != NOTHING
            cell = self._logical[r, held]
            if operation == "all_to_all":
                per_block = cells // p
                mine = (cell // per_block) % p == r
                cell = (cell // cells) * per_block + cell % per_block
                held = np.flatnonzero(held)[mine]
                cell = cell[mine]
            np.maximum.at(result[r], cell, share[r, held])
        return result

    def _places(self, buffer: int, chunk: int, count: int) -> slice:
        start = (0, self._program.num_chunks, 2 * self._program.num_chunks)[buffer] + chunk
        return slice(start, start + count)

    def _move(self, step: Step) -> tuple[tuple[int, ...], ...]:
        ops = step.ops()
        read: list[tuple[IntArray, IntArray]] = []
        for op in ops:
            at = self._places(op.src_buffer, op.src_chunk, op.count)
            read.append((self._logical[op.src_rank, at].copy(), self._counts[op.src_rank, at].copy()))
        for op, (logical, counts) in zip(ops, read, strict=True):
            at = self._places(op.dst_buffer, op.dst_chunk, op.count)
            self._logical[op.dst_rank, at] = logical
            if op.kind == COPY:
                self._counts[op.dst_rank, at] = counts
            else:
                self._counts[op.dst_rank, at] += counts
        return tuple(tuple(int(x) for x in logical) for logical, _ in read)
