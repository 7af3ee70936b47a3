"""Sums over all ranks with codecs: what `all_reduce(codec=…)` and the DDP hooks run.

A reducer is a generator of Works: it yields what it waits for, so that the first exchange of one bucket runs
while the next bucket is still being computed. All ranks must start, advance and wait in the same order.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from paceline.codecs.kernel.codec import Codec
from paceline.errors import ConfigError
from paceline.types import Communicator, Work

Layout = Sequence[tuple[int, Sequence[int]]]
_ALIGN = 64  # elements: chunks start at cache lines


class StagedWork:
    """A reducer in flight. `wait` runs the stages that are left; `advance` one of them."""

    def __init__(self, stages: Iterator[Work]) -> None:
        self._stages = stages
        self._error: BaseException | None = None
        self._pending: Work | None = None
        self._is_finished = False
        self._resume()

    def advance(self, timeout_s: float | None = None) -> bool:
        """Wait for the exchange in flight and start the next one; False when all is done."""
        if self._error is not None:
            raise self._error
        if self._pending is not None:
            try:
                self._pending.wait(timeout_s)
            except BaseException as error:
                self._error = error
                raise
            self._resume()
        return not self._is_finished

    def wait(self, timeout_s: float | None = None) -> None:
        """Run to the end; `timeout_s` bounds each exchange. Raises what the exchange or a decoder raised."""
        while self.advance(timeout_s):
            pass

    def is_done(self) -> bool:
        """Whether `wait` would return at once."""
        return self._is_finished or self._error is not None

    def exception(self) -> BaseException | None:
        """The error that ended it."""
        return self._error

    def _resume(self) -> None:
        try:
            self._pending = next(self._stages)
        except StopIteration:
            self._pending, self._is_finished = None, True
        except BaseException as error:
            self._error = error
            raise


def finish(works: Sequence[StagedWork]) -> None:
    """Run many to their ends, stage by stage, so that their exchanges overlap; one order on all ranks."""
    running = list(works)
    while running:
        running = [work for work in running if work.advance()]


class Reducer(abc.ABC):
    """Replaces a flat float32 tensor by its sum over all ranks, equal bits everywhere."""

    @abc.abstractmethod
    def stages(
        self, flat: torch.Tensor, layout: Layout, comm: Communicator, state: dict[str, Any]
    ) -> Iterator[Work]:
        """Yield each exchange; `flat` holds the sum when the generator ends."""

    @abc.abstractmethod
    def stats(self, state: dict[str, Any]) -> dict[str, float]:
        """Bytes by cause, encode seconds and extra memory since `state` was new."""

    @abc.abstractmethod
    def traffic(self, numel: int, layout: Layout, size: int) -> float:
        """Claim: bytes handed to the communicator for one tensor; an upper bound where values decide."""

    def start(
        self, flat: torch.Tensor, layout: Layout, comm: Communicator, state: dict[str, Any]
    ) -> StagedWork:
        """Begin; the first exchange is under way on return. ConfigError for a tensor that does not fit.

        `flat` is 1-D contiguous float32; `layout` gives offset and shape of each tensor in it (empty: one
        tensor), and what lies between them is zeroed; `state` belongs to this tensor and to the checkpoint.
        """
        if flat.dtype != torch.float32 or not flat.is_contiguous() or flat.dim() != 1:
            raise ConfigError(
                f"reducing with a codec needs 1-D contiguous float32, got {flat.dtype} {tuple(flat.shape)}"
            )
        zero_gaps(flat, layout)
        return StagedWork(self.stages(flat, layout, comm, state) if comm.size > 1 else iter(()))

    def reduce(self, flat: torch.Tensor, layout: Layout, comm: Communicator, state: dict[str, Any]) -> None:
        """Start and wait."""
        self.start(flat, layout, comm, state).wait()


def reducer_for(codec: Codec) -> Reducer:
    """Choose by the codec: two stages where payload sizes are known, all payloads to all where not."""
    from paceline.codecs.reducers.all_payloads import AllPayloads
    from paceline.codecs.reducers.two_stage import TwoStage

    return AllPayloads(codec) if codec.is_sparse else TwoStage(codec)


def zero_gaps(flat: torch.Tensor, layout: Layout) -> None:
    """Zero the padding: a codec writes noise there, which must not come back as a gradient and grow."""
    position = 0
    for offset, shape in sorted(layout):
        flat[position:offset].zero_()
        position = offset + torch.Size(shape).numel()
    if layout:
        flat[position:].zero_()


def split_evenly(numel: int, parts: int) -> list[tuple[int, int]]:
    """`parts` ranges over `numel` elements, starting at multiples of 64; the last ones may be empty."""
    step = -(-numel // (parts * _ALIGN)) * _ALIGN
    return [(min(i * step, numel), min((i + 1) * step, numel)) for i in range(parts)]
