"""The seams: small value types and the protocols that layers meet at.

Everything here is structural. Implementations live in `comm`, `strategies`, `codecs` and `train`; a layer
names only what it receives. torch is imported for annotations only, so `paceline schedule …` stays light.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

Rank = int


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


class Communicator(Protocol):
    """P ranks that exchange tensors.

    Tensors are contiguous and of one dtype and device per call. In-place operations say so. Every collective
    must be called by all ranks in the same order. All return a Work; none block beyond the hand-over.
    """

    @property
    def rank(self) -> Rank: ...
    @property
    def size(self) -> int: ...
    @property
    def hosts(self) -> Sequence[str]:
        """hosts[r] identifies the host of rank r; equal strings can share memory."""

    @property
    def fabric(self) -> str:
        """One of "native", "torch" and "simulated"."""

    def all_reduce(self, tensor: torch.Tensor, *, op: ReduceOp = ReduceOp.SUM) -> Work: ...
    def reduce(self, tensor: torch.Tensor, *, root: Rank = 0, op: ReduceOp = ReduceOp.SUM) -> Work: ...
    def broadcast(self, tensor: torch.Tensor, *, root: Rank = 0) -> Work: ...
    def all_gather(self, output: torch.Tensor, source: torch.Tensor) -> Work: ...
    def all_gather_v(self, output: torch.Tensor, source: torch.Tensor, *, counts: Sequence[int]) -> Work: ...
    def reduce_scatter(
        self, output: torch.Tensor, source: torch.Tensor, *, op: ReduceOp = ReduceOp.SUM
    ) -> Work: ...
    def reduce_scatter_v(
        self,
        output: torch.Tensor,
        source: torch.Tensor,
        *,
        counts: Sequence[int],
        op: ReduceOp = ReduceOp.SUM,
    ) -> Work: ...
    def gather(self, output: torch.Tensor | None, source: torch.Tensor, *, root: Rank = 0) -> Work: ...
    def scatter(self, output: torch.Tensor, source: torch.Tensor | None, *, root: Rank = 0) -> Work: ...
    def all_to_all(self, output: torch.Tensor, source: torch.Tensor) -> Work: ...
    def all_to_all_v(
        self,
        output: torch.Tensor,
        source: torch.Tensor,
        *,
        output_counts: Sequence[int],
        source_counts: Sequence[int],
    ) -> Work: ...
    def barrier(self) -> Work: ...
    def send(self, tensor: torch.Tensor, dst: Rank, *, tag: int = 0) -> Work: ...
    def recv(self, tensor: torch.Tensor, src: Rank | None = None, *, tag: int = 0) -> Work: ...

    def serve(self, channel: str, handler: Handler) -> None: ...
    def call(self, peer: Rank, channel: str, message: Message) -> Reply: ...
    def post(self, peer: Rank, channel: str, message: Message) -> None: ...

    def deferred(self) -> Reply:
        """A promise that a handler returns now and sets later."""

    def on_lost(self, callback: Callable[[Rank], None]) -> None:
        """Call `callback(rank)`, as a handler, when a peer's death is noticed."""

    def drain(self) -> None:
        """Collective: every message posted before, and by its handlers, has been handled."""

    def tolerate_loss(self) -> None:
        """From now on collectives may go on among the living, where the fabric can."""

    def allocate(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Zeroed 1-D tensor in the memory that this fabric reaches best."""

    def now(self) -> float:
        """Seconds on this fabric's clock: monotonic, or virtual when simulated."""

    def split(self, ranks: Sequence[Rank]) -> Communicator | None:
        """A communicator of `ranks` (all must call it); None on ranks that are not in it."""

    def close(self, *, goodbye: bool = True) -> None: ...


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
