"""Small value types and the promises that operations return. torch is imported for annotations only."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

Rank = int


def named(ranks: Iterable[Rank]) -> str:
    """Ranks as sentences name them: "rank 2", "ranks 0, 3"."""
    listed = list(ranks)
    return f"rank{'s' if len(listed) != 1 else ''} {', '.join(map(str, listed))}"


class ReduceOp(enum.Enum):
    """How contributions combine. MEAN divides by the number of ranks (integers: truncated towards zero)."""

    SUM = "sum"
    PRODUCT = "product"
    MIN = "min"
    MAX = "max"
    MEAN = "mean"
    BAND = "band"
    BOR = "bor"
    BXOR = "bxor"


class Work(Protocol):
    """A collective in flight. Tensors given to it must not be touched until `wait` returns."""

    def wait(self, timeout_s: float | None = None) -> None:
        """Block until done. Raises the operation's CommError; Timeout after `timeout_s` seconds."""

    def is_done(self) -> bool:
        """Whether `wait` would return (or raise) at once."""

    def exception(self) -> BaseException | None:
        """The error of a finished operation, else None."""


@dataclass(frozen=True)
class Message:
    """What servers and gossip send: a small header of plain values and some tensors. Never pickled."""

    header: Mapping[str, int | float | str | bool] = field(default_factory=dict)
    tensors: Sequence[torch.Tensor] = ()


class Reply(Protocol):
    """A promise of a Message: returned by `call`, and by a handler that answers later."""

    def wait(self, timeout_s: float | None = None) -> Message:
        """Block until the answer is here. Raises PeerLost, Timeout, or the handler's error."""

    def is_done(self) -> bool:
        """Whether `wait` would return (or raise) at once."""

    def set(self, message: Message) -> None:
        """Answer now (the handler's side)."""

    def fail(self, error: BaseException) -> None:
        """Answer with an error."""

    def then(self, callback: Callable[[Message | BaseException], None]) -> None:
        """Call `callback(outcome)` once answered; at once if it is. For handlers, which must not wait."""


Handler = Callable[[Rank, Message], "Message | Reply | None"]


@dataclass(frozen=True, slots=True)
class CallOptions:
    """What one call of an operation may ask for beside its arguments; the same on all ranks.

    Args:
        algorithm: An algorithm with its options, e.g. `"ring_chunked(segments=4)"`, or `"direct"`; None: the
            fabric's choice.
        priority: Above 0, the operation overtakes those in flight without one, between two of their slices.
        timeout_s: Deadline in seconds; None: the communicator's own.
    """

    algorithm: str | None = None
    priority: int = 0
    timeout_s: float | None = None


DEFAULT_OPTIONS = CallOptions()
"""The fabric's own choice; shared, so that an ordinary call makes no object."""
