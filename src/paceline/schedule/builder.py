"""Programs by hand, one transfer at a time."""

from __future__ import annotations

from dataclasses import replace

from paceline.schedule.program import COPY, REDUCE, Op, Program, Step, TransferKind, step_of

ChunkPlace = tuple[int, int, int]
"""(rank, buffer, chunk)"""


class Builder:
    """Collects transfers one by one, for hand-made programs and tests; shipped algorithms yield arrays.

    >>> b = Builder("mine", "broadcast", num_ranks=3, num_chunks=1)
    >>> b.copy((0, INPUT, 0), (0, OUTPUT, 0)).step()
    >>> b.copy((0, OUTPUT, 0), (1, OUTPUT, 0)).copy((0, OUTPUT, 0), (2, OUTPUT, 0)).step()
    >>> program = b.build()
    """

    def __init__(
        self,
        algorithm: str,
        operation: str,
        *,
        num_ranks: int,
        num_chunks: int,
        root: int = 0,
        num_scratch: int = 0,
        num_channels: int = 1,
    ) -> None:
        self._program = Program(
            algorithm, operation, num_ranks, num_chunks, tuple, root, num_scratch, num_channels
        )
        self._steps: list[Step] = []
        self._open: list[Op] = []

    def copy(self, src: ChunkPlace, dst: ChunkPlace, *, count: int = 1, channel: int = 0) -> Builder:
        """Add a copy of `count` chunks to the current step."""
        self._open.append(_op(COPY, src, dst, count, channel))
        return self

    def reduce(self, src: ChunkPlace, dst: ChunkPlace, *, count: int = 1, channel: int = 0) -> Builder:
        """Add a reduction of `count` chunks into `dst` to the current step."""
        self._open.append(_op(REDUCE, src, dst, count, channel))
        return self

    def step(self) -> None:
        """Close the current step."""
        self._steps.append(step_of(self._open))
        self._open = []

    def build(self) -> Program:
        """Return the program of all steps so far."""
        if self._open:
            self.step()
        steps = tuple(self._steps)
        return replace(self._program, make_steps=lambda: steps)


def _op(kind: TransferKind, src: ChunkPlace, dst: ChunkPlace, count: int, channel: int) -> Op:
    src_rank, src_buffer, src_chunk = src
    dst_rank, dst_buffer, dst_chunk = dst
    return Op(kind, src_rank, src_buffer, src_chunk, dst_rank, dst_buffer, dst_chunk, count, channel)
