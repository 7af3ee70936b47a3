"""What training, strategies and codecs are to each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from paceline.types.communicator import Communicator
from paceline.types.values import Work

if TYPE_CHECKING:
    import torch


class Bucket(Protocol):
    """A slice of a flat gradient buffer that is reduced at once."""

    index: int
    gradient: torch.Tensor


class Replica(Protocol):
    """One worker's model as flat buffers with views, one per (dtype, device); the module stays the truth."""

    parameters: Sequence[torch.Tensor]
    """Flat parameter buffers, allocated by the communicator."""
    gradients: Sequence[torch.Tensor]
    """Flat gradient buffers, same shapes and order."""
    buckets: Sequence[Bucket]


class Strategy(Protocol):
    """What travels, when, through whom, and how it is applied. Called by the training loop's hooks."""

    def attach(self, replica: Any, comm: Communicator) -> None: ...
    def gradient_ready(self, bucket: Any) -> None: ...
    def backward_done(self) -> None: ...
    def before_update(self) -> None: ...
    def after_update(self) -> None: ...
    def synchronize(self) -> None: ...
    def consensus(self) -> Any: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Codec(Protocol):
    """Fewer bytes for one flat tensor.

    `state` belongs to one tensor that is encoded again and again: a dict of tensors (residuals) and plain
    values, empty at first, part of the checkpoint.
    """

    is_unbiased: bool

    def max_encoded_bytes(self, numel: int) -> int: ...
    def encode(
        self, x: torch.Tensor, state: dict[str, Any], *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """1-D uint8 payload that describes itself; a slice of `out` when given."""

    def decode(self, payload: torch.Tensor, out: torch.Tensor, *, accumulate: bool = False) -> None:
        """Store in `out`, or add to it. ProtocolError leaves `out` untouched."""

    def stats(self, state: dict[str, Any]) -> dict[str, float]:
        """Bytes by cause, encode seconds and extra memory since `state` was new."""


class Reducer(Protocol):
    """Replaces a flat tensor by (an approximation of) its sum over all ranks; equal bits on all."""

    def start(
        self,
        flat: torch.Tensor,
        layout: Sequence[tuple[int, Sequence[int]]],
        comm: Communicator,
        state: dict[str, Any],
    ) -> Work:
        """Begin; `layout` gives offset and shape of each tensor in `flat`. Same order on all ranks."""
