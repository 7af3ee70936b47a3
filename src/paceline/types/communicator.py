"""What a communicator is to the layers above it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from paceline.types.values import Handler, Message, Rank, ReduceOp, Reply, Work

if TYPE_CHECKING:
    import torch


class Ledger(Protocol):
    """What one rank handed to its communicator; see `paceline.comm.ledger`."""

    wait_s: float
    """Seconds spent waiting for works and replies, on the fabric's clock."""

    @property
    def payload_bytes(self) -> int:
        """Bytes handed to all operations so far."""

    def scheduled_bytes(self, size: int) -> float:
        """Bytes that this rank of `size` had to send to others, by the schedules that send the fewest."""

    def snapshot(self) -> dict[str, Any]:
        """Plain values: `payload_bytes`, `wire_bytes`, `wait_s`, `operations`; of many types, for JSON."""


class Store(Protocol):
    """The key-value store that the ranks of a job met in. Keys are strings, values bytes."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes:
        """The value; blocks until there is one."""

    def check(self, keys: list[str]) -> bool:
        """Whether all `keys` have a value; does not block."""


class Meeting(Protocol):
    """Where the ranks of a job met; see `paceline.comm.rendezvous.meeting`."""

    @property
    def store(self) -> Store: ...


class Communicator(Protocol):
    """P ranks that exchange tensors.

    Tensors are contiguous and of one dtype and device per call; shapes below count elements. Every collective
    is called by all ranks in the same order with fitting arguments. Operations return a Work and do not block
    beyond the hand-over: tensors given to them must not be read or written until its `wait` returned. Inputs
    and outputs do not overlap, except that in-place operations have one tensor for both.

    Common arguments:
        op: How contributions combine; default: their sum.
        root: The rank that has or gets the data; default 0.
        algorithm: An algorithm with its options, e.g. `"ring_chunked(segments=4)"`, for this call; the same
            on all ranks. Default: the fabric's choice. Only between hosts of one rank each, native fabric.
        priority: Above 0 the operation overtakes those in flight without one; default 0. Native fabric.

    Raises:
        ConfigError: Arguments that are wrong on this rank: shapes, dtypes, devices, ranks.
        CommError: From `Work.wait`: PeerLost, Timeout, or Mismatch where ranks disagree.
    """

    min_size: int
    """Number of living ranks with which the job continues; see `tolerate_loss`."""
    unusable: str | None
    """Why no further operation may start: closed, or an operation failed; None while all is well."""

    @property
    def rank(self) -> Rank:
        """This rank, 0 … size - 1."""

    @property
    def size(self) -> int:
        """P, the number of ranks."""

    @property
    def hosts(self) -> Sequence[str]:
        """hosts[r] identifies the host of rank r; ranks with equal strings can share memory."""

    @property
    def fabric(self) -> str:
        """One of "native", "torch" and "simulated"."""

    @property
    def ledger(self) -> Ledger:
        """What this rank handed to its operations."""

    @property
    def meeting(self) -> Meeting | None:
        """Where the job's ranks met; None for a part of the job and in a simulation."""

    def all_reduce(
        self,
        tensor: torch.Tensor,
        *,
        op: ReduceOp = ReduceOp.SUM,
        algorithm: str | None = None,
        priority: int = 0,
    ) -> Work:
        """Replace `tensor` on every rank by the reduction over ranks.

        Args:
            tensor: This rank's contribution, any shape, equal on all ranks; overwritten by the result.
            op: See the class.
            algorithm: See the class.
            priority: See the class.
        """

    def reduce(
        self,
        tensor: torch.Tensor,
        *,
        root: Rank = 0,
        op: ReduceOp = ReduceOp.SUM,
        algorithm: str | None = None,
        priority: int = 0,
    ) -> Work:
        """Replace `tensor` on `root` by the reduction over ranks.

        Args:
            tensor: This rank's contribution; overwritten: by the result on `root`, unspecified elsewhere.
            root: See the class.
            op: See the class.
            algorithm: See the class.
            priority: See the class.
        """

    def broadcast(
        self, tensor: torch.Tensor, *, root: Rank = 0, algorithm: str | None = None, priority: int = 0
    ) -> Work:
        """Replace `tensor` on every rank by that of `root`.

        Args:
            tensor: The data on `root`; overwritten elsewhere. Same number of elements on all ranks.
            root: See the class.
            algorithm: See the class.
            priority: See the class.
        """

    def all_gather(
        self, output: torch.Tensor, source: torch.Tensor, *, algorithm: str | None = None, priority: int = 0
    ) -> Work:
        """Collect every rank's tensor on every rank.

        Args:
            output: [P·n], overwritten: the ranks' sources in rank order.
            source: [n], this rank's contribution; not changed.
            algorithm: See the class.
            priority: See the class.
        """

    def all_gather_v(self, output: torch.Tensor, source: torch.Tensor, *, counts: Sequence[int]) -> Work:
        """As `all_gather`, with contributions of different sizes.

        Args:
            output: [Σ counts], overwritten.
            source: [counts[rank]], not changed.
            counts: Elements of every rank's source; equal on all ranks.
        """

    def reduce_scatter(
        self,
        output: torch.Tensor,
        source: torch.Tensor,
        *,
        op: ReduceOp = ReduceOp.SUM,
        algorithm: str | None = None,
        priority: int = 0,
    ) -> Work:
        """Reduce over ranks; every rank gets its share of the result.

        Args:
            output: [n], overwritten by share `rank` of the reduction.
            source: [P·n], this rank's contribution; not changed.
            op: See the class.
            algorithm: See the class.
            priority: See the class.
        """

    def reduce_scatter_v(
        self,
        output: torch.Tensor,
        source: torch.Tensor,
        *,
        counts: Sequence[int],
        op: ReduceOp = ReduceOp.SUM,
    ) -> Work:
        """As `reduce_scatter`, with shares of different sizes.

        Args:
            output: [counts[rank]], overwritten.
            source: [Σ counts], not changed.
            counts: Elements of every rank's share; equal on all ranks.
            op: See the class.
        """

    def gather(self, output: torch.Tensor | None, source: torch.Tensor, *, root: Rank = 0) -> Work:
        """Collect every rank's tensor on one rank.

        Args:
            output: [P·n] on `root`, overwritten; None elsewhere.
            source: [n], not changed.
            root: See the class.
        """

    def scatter(self, output: torch.Tensor, source: torch.Tensor | None, *, root: Rank = 0) -> Work:
        """Give every rank its share of one rank's tensor.

        Args:
            output: [n], overwritten by share `rank`.
            source: [P·n] on `root`, not changed; None elsewhere.
            root: See the class.
        """

    def all_to_all(self, output: torch.Tensor, source: torch.Tensor) -> Work:
        """Give share r of every rank's tensor to rank r.

        Args:
            output: [P·n], overwritten: what every rank sent here, in rank order.
            source: [P·n], not changed; share r goes to rank r.
        """

    def all_to_all_v(
        self,
        output: torch.Tensor,
        source: torch.Tensor,
        *,
        output_counts: Sequence[int],
        source_counts: Sequence[int],
    ) -> Work:
        """As `all_to_all`, with shares of different sizes.

        Args:
            output: [Σ output_counts], overwritten.
            source: [Σ source_counts], not changed.
            output_counts: Elements from every rank; what those ranks send here.
            source_counts: Elements to every rank.
        """

    def barrier(self) -> Work:
        """Done when every rank has called it."""

    def send(self, tensor: torch.Tensor, dst: Rank, *, tag: int = 0) -> Work:
        """Send to one rank; done when `tensor` may be changed again.

        Args:
            tensor: The data, not changed.
            dst: The receiving rank.
            tag: Matches the `recv` there with the same tag, in the order of the calls.
        """

    def recv(self, tensor: torch.Tensor, src: Rank | None = None, *, tag: int = 0) -> Work:
        """Receive from one rank, or from the first that sends.

        Args:
            tensor: Overwritten; as many elements, and the dtype, of what is sent.
            src: The sending rank; None: any.
            tag: See `send`.
        """

    def serve(self, channel: str, handler: Handler) -> None:
        """Answer messages on a channel from now on.

        Args:
            channel: Name that callers use.
            handler: Called with (sender, message) on the message service; must not wait. It returns the
                answer, a `deferred()` reply, or None.

        Raises:
            ConfigError: The channel has a handler already.
        """

    def call(self, peer: Rank, channel: str, message: Message) -> Reply:
        """Send a message whose answer is wanted; returns at once unless the outbox is full.

        Args:
            peer: The receiving rank; may be this one.
            channel: Served by `peer`, now or later.
            message: Copied before the call returns.
        """

    def post(self, peer: Rank, channel: str, message: Message) -> None:
        """Send a message without an answer; an error of its handler is raised by `drain`.

        Args:
            peer: The receiving rank; may be this one.
            channel: Served by `peer`, now or later.
            message: Copied before the call returns.
        """

    def deferred(self) -> Reply:
        """A promise that a handler returns now and sets later."""

    def on_lost(self, callback: Callable[[Rank], None]) -> None:
        """Learn of peers that die.

        Args:
            callback: Called with the rank, as a handler, when its death is noticed.
        """

    def drain(self) -> None:
        """Collective: every message posted before, and by its handlers, has been handled. Blocks."""

    def tolerate_loss(self) -> None:
        """From now on collectives may continue among the living ranks, where the fabric can. Blocks."""

    def charge_compute(self, share: float = 1.0) -> None:
        """In virtual time, let compute time pass; nothing otherwise.

        Args:
            share: Part of one minibatch's compute time.
        """

    def off_clock(self) -> AbstractContextManager[None]:
        """In virtual time, operations inside take no time (evaluation)."""

    def allocate(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory that this fabric reaches best; it lives until its last view is gone.

        Args:
            numel: Number of elements.
            dtype: Any that the fabric moves.

        Returns:
            Zeroed 1-D tensor.
        """

    def now(self) -> float:
        """Seconds on this fabric's clock: monotonic, or virtual when simulated."""

    def split(self, ranks: Sequence[Rank]) -> Communicator | None:
        """Collective of all ranks: a communicator of some of them. Blocks.

        Args:
            ranks: Distinct ranks, in the order of their new numbers; equal on all ranks.

        Returns:
            The new communicator; None on ranks that are not in it.
        """

    def close(self, *, goodbye: bool = True) -> None:
        """Release what the fabric holds; may be called again.

        Args:
            goodbye: Tell peers that this rank leaves; without it, they take it for lost.
        """
