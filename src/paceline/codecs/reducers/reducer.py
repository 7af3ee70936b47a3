"""Sums over all ranks with codecs: what `all_reduce(codec=…)` and the DDP hooks run.

A reducer is a generator of Works: it yields each exchange that it waits for, so that the first exchange of
one bucket runs while the next bucket is still being computed. All ranks must start, advance and wait in the
same order.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from typing import Any

import torch

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
        """Run to the end; `timeout_s` bounds each exchange. Raises the error of an exchange or a decoder."""
        while self.advance(timeout_s):
            pass

    def is_done(self) -> bool:
        """Whether `wait` would return (or raise) at once."""
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
    """Run all `works` to the end, stage by stage, so that their exchanges overlap.

    All ranks must pass them in the same order.
    """
    running = list(works)
    while running:
        running = [work for work in running if work.advance()]


class Reducer(abc.ABC):
    """Replaces a flat float32 tensor by (an approximation of) its sum over all ranks, equal bits everywhere.

    The abstract base of methods that are more than a codec, and the seam for strategies and DDP hooks. The
    `state` given to its methods is a dict of tensors and plain values, one per tensor that is summed again
    and again (a bucket); it is empty at first, belongs to the reducer, and belongs in the checkpoint.
    """

    @abc.abstractmethod
    def stages(
        self, flat: torch.Tensor, layout: Layout, comm: Communicator, state: dict[str, Any]
    ) -> Iterator[Work]:
        """Yield each exchange; `flat` holds the sum when the generator ends. Arguments as for `start`."""

    @abc.abstractmethod
    def stats(self, state: dict[str, Any]) -> dict[str, float]:
        """Bytes by cause, encode seconds and extra memory since `state` was new."""

    @abc.abstractmethod
    def traffic(self, numel: int, layout: Layout, size: int) -> float:
        """Claim: bytes handed to the communicator for one tensor of `numel` elements on `size` ranks.

        An upper bound where the values decide how much is sent.
        """

    def start(
        self, flat: torch.Tensor, layout: Layout, comm: Communicator, state: dict[str, Any]
    ) -> StagedWork:
        """Begin to sum; the first exchange is in flight on return.

        Args:
            flat: 1-D contiguous float32; replaced by the sum once the returned work has been waited for, and
                not to be touched before.
            layout: Offset and shape of each tensor in `flat`; empty means one tensor. The gaps between them
                are zeroed.
            comm: The ranks; all must call in the same order.
            state: What is kept for this tensor, see the class.

        Raises:
            ConfigError: A tensor of another dtype or shape, or a layout that does not fit.
        """
        if flat.dtype != torch.float32 or not flat.is_contiguous() or flat.dim() != 1:
            raise ConfigError(
                f"reducing with a codec needs 1-D contiguous float32, got {flat.dtype} {tuple(flat.shape)}"
            )
        # Tensors without elements share their offset with a neighbour, and there is nothing to send of them.
        filled = [(offset, shape) for offset, shape in layout if torch.Size(shape).numel()]
        zero_gaps(flat, filled)
        is_empty = flat.numel() == 0 or (bool(layout) and not filled)
        if comm.size == 1 or is_empty:
            return StagedWork(iter(()))
        return StagedWork(self.stages(flat, filled, comm, state))

    def reduce(self, flat: torch.Tensor, layout: Layout, comm: Communicator, state: dict[str, Any]) -> None:
        """Replace `flat` by its sum; returns when that is done. Arguments as for `start`."""
        self.start(flat, layout, comm, state).wait()


def payload_buffer(num_bytes: int, flat: torch.Tensor, comm: Communicator) -> torch.Tensor:
    """Bytes to send or receive payloads of `flat` with, where `comm` takes them.

    On the CPU, pinned for a GPU's tensor; on the GPU if the communicator takes no CPU tensors (a process
    group of NCCL alone).
    """
    device = getattr(comm, "payload_device", None) or torch.device("cpu")
    is_pinned = flat.is_cuda and device.type == "cpu"
    return torch.empty(num_bytes, dtype=torch.uint8, device=device, pin_memory=is_pinned)


def zero_gaps(flat: torch.Tensor, layout: Layout) -> None:
    """Zero the padding: a codec writes noise there, which must not return as a gradient and grow."""
    position = 0
    for offset, shape in sorted(layout):
        flat[position:offset].zero_()
        position = offset + torch.Size(shape).numel()
    if layout:
        flat[position:].zero_()


def split_evenly(numel: int, parts: int) -> list[tuple[int, int]]:
    """Return `parts` ranges over `numel` elements that start at multiples of 64; the last may be empty."""
    step = -(-numel // (parts * _ALIGN)) * _ALIGN
    return [(min(i * step, numel), min((i + 1) * step, numel)) for i in range(parts)]
