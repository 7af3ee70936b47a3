"""What a rank does by itself besides training: codecs and servers say so, and a simulation charges it.

On real fabrics nobody listens, and a charge costs one look at a thread-local variable.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class WorkKind(str, Enum):
    """What local work is for."""

    ENCODE = "encode"
    DECODE = "decode"
    SERVER = "server"
    """Updates that a parameter server applies, and the copies that it answers with."""
    ARITHMETIC = "arithmetic"
    """Passes over vectors of a strategy's own: outer steps, differences, means."""

    __str__ = str.__str__


Rehearsal = Callable[[], Callable[[], object]]
"""Makes copies of what the work needs, and returns the work on these copies: what is timed."""


class WorkMeter(Protocol):
    """Who listens: a simulation."""

    def charge(self, kind: WorkKind, what: str, numel: int, rehearsal: Rehearsal, times: float) -> None:
        """Let the time pass that `times` such works take."""


class _Local(threading.local):
    meter: WorkMeter | None = None


_local = _Local()


def listen(meter: WorkMeter | None) -> None:
    """Let `meter` hear what this thread does from now on; None: nobody."""
    _local.meter = meter


@contextmanager
def unheard() -> Iterator[None]:
    """What this thread does inside is not charged: a rehearsal, or a part of what is charged as a whole."""
    before, _local.meter = _local.meter, None
    try:
        yield
    finally:
        _local.meter = before


def is_heard() -> bool:
    """Whether charges of this thread have any effect."""
    return _local.meter is not None


def charge(kind: WorkKind, what: str, numel: int, rehearsal: Rehearsal, *, times: float = 1.0) -> None:
    """Say that this rank has just done some work: in virtual time it takes as long as its rehearsal did.

    Args:
        kind: What it was for.
        what: Names the work; with kind and `numel` it decides how long it takes.
        numel: Elements worked on; nothing is charged for none.
        rehearsal: How to do it once more without changing anything; used when it was never timed.
        times: How often it was done.
    """
    meter = _local.meter
    if meter is not None and numel > 0 and times > 0:
        meter.charge(kind, what, numel, rehearsal, times)


def charge_passes(
    tensors: Sequence[torch.Tensor], passes: float, kind: WorkKind = WorkKind.ARITHMETIC
) -> None:
    """Say that this rank went over all of `tensors` together: one pass is `c = a + b` in float32."""
    if is_heard():
        numel = sum(tensor.numel() for tensor in tensors)
        charge(kind, "pass", numel, lambda: _one_pass(numel), times=passes)


def _one_pass(numel: int) -> Callable[[], object]:
    import torch

    a, b, c = torch.ones(numel), torch.ones(numel), torch.zeros(numel)
    return lambda: torch.add(a, b, out=c)
