"""What only the native fabric offers: `algorithm=` for one call, `priority=` to overtake, and `explain`."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from paceline.comm.native.communicator import CoreCommunicator
from paceline.comm.native.select import Choice
from paceline.errors import ConfigError
from paceline.types import Rank, ReduceOp, Work


class ChoosingCommunicator(CoreCommunicator):
    """A communicator whose operations take `algorithm` and `priority`.

    `algorithm`: a name from `paceline schedule list`, or "direct", of an all_reduce between hosts also
    "direct:shares=33/33/34/0" with a weight for every rank (comm/uneven.py); all ranks must give the same.
    `priority` above 0: the operation overtakes those in flight without one, between two of their slices;
    urgent ones keep their order among themselves.
    """

    _urgent_lane: ChoosingCommunicator | None = None

    def all_reduce(
        self,
        tensor: torch.Tensor,
        *,
        op: ReduceOp = ReduceOp.SUM,
        algorithm: str | None = None,
        priority: int = 0,
    ) -> Work:
        """Replace `tensor` on every rank by the reduction over ranks."""
        if algorithm is None and not priority:
            return super().all_reduce(tensor, op=op)
        return self._specially("all_reduce", algorithm, priority, tensor, op=op)

    def reduce(
        self,
        tensor: torch.Tensor,
        *,
        root: Rank = 0,
        op: ReduceOp = ReduceOp.SUM,
        algorithm: str | None = None,
        priority: int = 0,
    ) -> Work:
        """Replace `tensor` on `root` by the reduction; elsewhere its content is unspecified afterwards."""
        if algorithm is None and not priority:
            return super().reduce(tensor, root=root, op=op)
        return self._specially("reduce", algorithm, priority, tensor, root=root, op=op)

    def broadcast(
        self, tensor: torch.Tensor, *, root: Rank = 0, algorithm: str | None = None, priority: int = 0
    ) -> Work:
        """Replace `tensor` on every rank by the root's."""
        if algorithm is None and not priority:
            return super().broadcast(tensor, root=root)
        return self._specially("broadcast", algorithm, priority, tensor, root=root)

    def all_gather(
        self,
        output: torch.Tensor,
        source: torch.Tensor,
        *,
        algorithm: str | None = None,
        priority: int = 0,
    ) -> Work:
        """`output` (P times as many elements) becomes every rank's `source`, in rank order."""
        if algorithm is None and not priority:
            return super().all_gather(output, source)
        return self._specially("all_gather", algorithm, priority, output, source)

    def reduce_scatter(
        self,
        output: torch.Tensor,
        source: torch.Tensor,
        *,
        op: ReduceOp = ReduceOp.SUM,
        algorithm: str | None = None,
        priority: int = 0,
    ) -> Work:
        """`output` becomes this rank's share of the reduction of `source` (P times as many elements)."""
        if algorithm is None and not priority:
            return super().reduce_scatter(output, source, op=op)
        return self._specially("reduce_scatter", algorithm, priority, output, source, op=op)

    @abc.abstractmethod
    def explain(self, operation: str, num_bytes: int, *, buffers: str = "private") -> Choice:
        """Which algorithm `operation` gets for a buffer of `num_bytes`, why, and the runner-up.

        `buffers`: "private", or "allocated" by the communicator.
        """

    @abc.abstractmethod
    def using(self, algorithm: str) -> contextlib.AbstractContextManager[None]:
        """Operations inside run `algorithm`; the same on all ranks. ConfigError for one that cannot."""

    @abc.abstractmethod
    def _open_urgent_lane(self) -> ChoosingCommunicator: ...

    def _specially(
        self, name: str, algorithm: str | None, priority: int, *tensors: torch.Tensor, **options: Any
    ) -> Work:
        if isinstance(priority, bool) or not isinstance(priority, int) or priority < 0:
            raise ConfigError(f"{self._who()}: {name}: priority={priority!r}: a whole number >= 0 expected")
        target = self._urgent() if priority else self
        with target.using(algorithm) if algorithm is not None else contextlib.nullcontext():
            work: Work = getattr(target, name)(*tensors, **options)
        return work

    def _urgent(self) -> ChoosingCommunicator:
        """The same ranks on a queue of its own; made when first needed, by all ranks at the same call."""
        if self._urgent_lane is None:
            if self.unusable is not None:
                self._refuse("priority", None)
            lane = self._urgent_lane = self._open_urgent_lane()
            lane.ledger = self.ledger
            for name, entry in vars(self).items():
                if name.startswith("_n_"):
                    setattr(lane, name, entry)
        return self._urgent_lane

    def _close(self) -> None:
        if self._urgent_lane is not None:
            self._urgent_lane.close()
        super()._close()


@contextlib.contextmanager
def replaced(holder: Any, name: str, value: Any) -> Iterator[None]:
    """Give `holder` another attribute for a moment."""
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)
