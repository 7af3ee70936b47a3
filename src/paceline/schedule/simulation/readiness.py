"""When the data that a transfer reads is available: per chunk, or for very large programs per rank.

`ByChunk` has a time for every chunk of every rank. `ByRank` has one time per rank: a rank passes data on only
after everything that it received in earlier steps. Its times are never too early. They equal those of
`ByChunk` where ranks and links are alike and no reduction overlaps a transfer, and need P numbers instead of
P times the number of chunks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

import numpy as np

from paceline.schedule.program import INPUT, Program, Step
from paceline.schedule.simulation.servers import raise_to
from paceline.schedule.topology import FloatArray, IntArray

_MAX_CHUNKS_KNOWN = 1 << 23


class Readiness(ABC):
    """Times (s) from which data may be read."""

    @abstractmethod
    def of_sources(self, step: Step) -> FloatArray:
        """When the data that each transfer reads is available, shape (n,)."""

    @abstractmethod
    def of_destinations(self, step: Step) -> FloatArray:
        """When the data that each transfer combines with or overwrites is available, shape (n,)."""

    @abstractmethod
    def written(self, step: Step, done_s: FloatArray, *, once: bool) -> None:
        """Record that the transfers of `step` were complete at `done_s`, shape (n,).

        `once`: no rank receives twice in this step.
        """


def track(program: Program, entered_s: FloatArray, *, by_chunk: bool | None = None) -> Readiness:
    """Track per chunk or per rank: as `by_chunk` says, else per chunk if that fits in memory.

    `entered_s`: when each rank starts, shape (P,).
    """
    places = program.num_ranks * (2 * program.num_chunks + program.num_scratch)
    if by_chunk is None:
        by_chunk = places <= _MAX_CHUNKS_KNOWN
    return ByChunk(program, entered_s) if by_chunk else ByRank(entered_s)


@final
class ByRank(Readiness):
    """One time per rank: `latest_s`, shape (P,). INPUT is available from the start."""

    def __init__(self, entered_s: FloatArray) -> None:
        self._entered_s = entered_s
        self.latest_s = entered_s.copy()

    def of_sources(self, step: Step) -> FloatArray:
        """The source rank's time, or its start if it reads its INPUT."""
        latest = self.latest_s[step.src_rank]
        raw = step.src_buffer == INPUT
        if raw.any():
            latest = np.where(raw, self._entered_s[step.src_rank], latest)
        return latest

    def of_destinations(self, step: Step) -> FloatArray:
        """The destination rank's time."""
        return self.latest_s[step.dst_rank]

    def written(self, step: Step, done_s: FloatArray, *, once: bool) -> None:
        """Raise the destination ranks' times."""
        raise_to(self.latest_s, step.dst_rank, done_s, once=once)


@final
class ByChunk(Readiness):
    """One time per (rank, buffer, chunk)."""

    def __init__(self, program: Program, entered_s: FloatArray) -> None:
        self._offsets = np.array([0, program.num_chunks, 2 * program.num_chunks])
        self._width = 2 * program.num_chunks + program.num_scratch
        self._times_s = np.repeat(entered_s, self._width)

    def of_sources(self, step: Step) -> FloatArray:
        """Latest of the chunks read."""
        return self._latest(step.src_rank, step.src_buffer, step.src_chunk, step.count)

    def of_destinations(self, step: Step) -> FloatArray:
        """Latest of the chunks written to."""
        return self._latest(step.dst_rank, step.dst_buffer, step.dst_chunk, step.count)

    def written(self, step: Step, done_s: FloatArray, *, once: bool) -> None:
        """Raise the times of the chunks written."""
        places = self._places(step.dst_rank, step.dst_buffer, step.dst_chunk, step.count)
        raise_to(self._times_s, places, np.repeat(done_s, step.count), once=once)

    def _latest(self, rank: IntArray, buffer: IntArray, chunk: IntArray, count: IntArray) -> FloatArray:
        times = self._times_s[self._places(rank, buffer, chunk, count)]
        if (count == 1).all():
            return times
        first = np.cumsum(count) - count
        return np.asarray(np.maximum.reduceat(times, first))

    def _places(self, rank: IntArray, buffer: IntArray, chunk: IntArray, count: IntArray) -> IntArray:
        base = rank * self._width + self._offsets[buffer] + chunk
        if (count == 1).all():
            return np.asarray(base)
        before = np.cumsum(count) - count
        return np.repeat(base - before, count) + np.arange(int(count.sum()))
