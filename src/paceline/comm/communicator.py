"""What the fabrics share: arguments are checked, bytes are counted, then the fabric's own method runs.

A fabric subclasses `FabricCommunicator` and implements `FabricOperations` (`start_all_reduce` and so on) on
arguments that are valid. Per call the shared part costs a few attribute reads.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch

from paceline.comm import loss_exchange
from paceline.comm.fabric_operations import FabricOperations
from paceline.comm.ledger import Ledger
from paceline.comm.messages import mailbox
from paceline.comm.messages.mailbox import Mailbox
from paceline.comm.messages.reply import Deferred
from paceline.comm.rendezvous.meeting import Meeting
from paceline.comm.survivors import Survivors
from paceline.errors import CommError, ConfigError
from paceline.types import (
    DEFAULT_OPTIONS,
    CallOptions,
    Handler,
    Message,
    Rank,
    ReduceOp,
    Reply,
    Work,
)

_BITWISE = (ReduceOp.BAND, ReduceOp.BOR, ReduceOp.BXOR)


class FabricCommunicator(FabricOperations):
    """P ranks that exchange tensors; see `paceline.types.Communicator` for the contract.

    Raises ConfigError for arguments that are wrong on this rank alone; what ranks disagree about is found by
    the fabric.
    """

    fabric: str

    def __init__(self, rank: Rank, size: int, hosts: Sequence[str], *, ledger: Ledger | None = None) -> None:
        if not 0 <= rank < size or len(hosts) != size:
            raise ConfigError(f"rank {rank} of {size} with {len(hosts)} hosts: expected one host per rank")
        self.rank = rank
        self.size = size
        self.hosts: Sequence[str] = tuple(hosts)
        self.ledger = ledger or Ledger()
        self.unusable: str | None = None
        """Why no further operation may start: closed, or an operation failed. None while all is well."""
        self.meeting: Meeting | None = None
        """Where the job's ranks met; set by a fabric that offers messages."""
        self.min_size = size
        """With how many living ranks the job is worth going on; see `tolerate_loss`."""
        self._open_mailbox: Mailbox | None = None
        self._served: set[str] = set()
        self._survivors: Survivors | None = None
        self._counters = self.ledger.counters

    # Collectives. Every rank calls them in the same order.

    def all_reduce(
        self,
        tensor: torch.Tensor,
        *,
        op: ReduceOp = ReduceOp.SUM,
        algorithm: str | None = None,
        priority: int = 0,
    ) -> Work:
        """Replace `tensor` on every rank by the reduction over ranks."""
        if self.unusable is not None or not tensor.is_contiguous():
            self._refuse("all_reduce", tensor)
        if op is not ReduceOp.SUM:
            self._check_op("all_reduce", tensor, op)
        options = self._options("all_reduce", algorithm, priority)
        entry = self._counters.all_reduce
        entry.calls += 1
        entry.payload_bytes += tensor.nbytes
        return self._performer(options).start_all_reduce(tensor, op, options)

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
        self._check("reduce", tensor, root=root)
        self._check_op("reduce", tensor, op)
        options = self._options("reduce", algorithm, priority)
        self._counters.reduce.calls += 1
        self._counters.reduce.payload_bytes += tensor.nbytes
        return self._performer(options).start_reduce(tensor, root, op, options)

    def broadcast(
        self, tensor: torch.Tensor, *, root: Rank = 0, algorithm: str | None = None, priority: int = 0
    ) -> Work:
        """Replace `tensor` on every rank by the root's."""
        self._check("broadcast", tensor, root=root)
        options = self._options("broadcast", algorithm, priority)
        self._counters.broadcast.calls += 1
        if self.rank == root:
            self._counters.broadcast.payload_bytes += tensor.nbytes
        return self._performer(options).start_broadcast(tensor, root, options)

    def all_gather(
        self, output: torch.Tensor, source: torch.Tensor, *, algorithm: str | None = None, priority: int = 0
    ) -> Work:
        """`output` (P times as many elements) becomes every rank's `source`, in rank order."""
        self._check("all_gather", source, output)
        self._check_numel("all_gather", "output", output, source.numel() * self.size)
        options = self._options("all_gather", algorithm, priority)
        self._counters.all_gather.calls += 1
        self._counters.all_gather.payload_bytes += source.nbytes
        return self._performer(options).start_all_gather(output, source, options)

    def all_gather_v(self, output: torch.Tensor, source: torch.Tensor, *, counts: Sequence[int]) -> Work:
        """As all_gather with `counts[r]` elements from rank r."""
        self._check("all_gather_v", source, output)
        self._check_counts("all_gather_v", "counts", counts)
        self._check_numel("all_gather_v", "source", source, counts[self.rank])
        self._check_numel("all_gather_v", "output", output, sum(counts))
        self._counters.all_gather_v.calls += 1
        self._counters.all_gather_v.payload_bytes += source.nbytes
        return self._performer(DEFAULT_OPTIONS).start_all_gather_v(output, source, counts)

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
        self._check("reduce_scatter", source, output)
        self._check_op("reduce_scatter", source, op)
        self._check_numel("reduce_scatter", "source", source, output.numel() * self.size)
        options = self._options("reduce_scatter", algorithm, priority)
        self._counters.reduce_scatter.calls += 1
        self._counters.reduce_scatter.payload_bytes += source.nbytes
        return self._performer(options).start_reduce_scatter(output, source, op, options)

    def reduce_scatter_v(
        self,
        output: torch.Tensor,
        source: torch.Tensor,
        *,
        counts: Sequence[int],
        op: ReduceOp = ReduceOp.SUM,
    ) -> Work:
        """As reduce_scatter with `counts[r]` elements for rank r."""
        self._check("reduce_scatter_v", source, output)
        self._check_op("reduce_scatter_v", source, op)
        self._check_counts("reduce_scatter_v", "counts", counts)
        self._check_numel("reduce_scatter_v", "output", output, counts[self.rank])
        self._check_numel("reduce_scatter_v", "source", source, sum(counts))
        self._counters.reduce_scatter_v.calls += 1
        self._counters.reduce_scatter_v.payload_bytes += source.nbytes
        return self._performer(DEFAULT_OPTIONS).start_reduce_scatter_v(output, source, counts, op)

    def gather(self, output: torch.Tensor | None, source: torch.Tensor, *, root: Rank = 0) -> Work:
        """On `root`, `output` becomes every rank's `source`; None elsewhere."""
        self._check("gather", source, output, root=root)
        if self.rank == root:
            self._check_numel("gather", "output", output, source.numel() * self.size)
        self._counters.gather.calls += 1
        self._counters.gather.payload_bytes += source.nbytes
        return self._performer(DEFAULT_OPTIONS).start_gather(
            output if self.rank == root else None, source, root
        )

    def scatter(self, output: torch.Tensor, source: torch.Tensor | None, *, root: Rank = 0) -> Work:
        """`output` becomes this rank's share of the root's `source`; None elsewhere."""
        self._check("scatter", output, source, root=root)
        self._counters.scatter.calls += 1
        if self.rank == root:
            self._check_numel("scatter", "source", source, output.numel() * self.size)
            assert source is not None
            self._counters.scatter.payload_bytes += source.nbytes
        return self._performer(DEFAULT_OPTIONS).start_scatter(
            output, source if self.rank == root else None, root
        )

    def all_to_all(self, output: torch.Tensor, source: torch.Tensor) -> Work:
        """Share r of `source` goes to rank r; `output` holds what every rank sent here, in rank order."""
        self._check("all_to_all", source, output)
        self._check_numel("all_to_all", "output", output, source.numel())
        if source.numel() % self.size:
            raise ConfigError(
                f"{self.who()}: all_to_all: {source.numel()} elements are not divisible by {self.size} ranks;"
                " use all_to_all_v"
            )
        self._counters.all_to_all.calls += 1
        self._counters.all_to_all.payload_bytes += source.nbytes
        return self._performer(DEFAULT_OPTIONS).start_all_to_all(output, source)

    def all_to_all_v(
        self,
        output: torch.Tensor,
        source: torch.Tensor,
        *,
        output_counts: Sequence[int],
        source_counts: Sequence[int],
    ) -> Work:
        """As all_to_all with `source_counts[r]` elements to, and `output_counts[r]` from, rank r."""
        self._check("all_to_all_v", source, output)
        self._check_counts("all_to_all_v", "output_counts", output_counts)
        self._check_counts("all_to_all_v", "source_counts", source_counts)
        self._check_numel("all_to_all_v", "output", output, sum(output_counts))
        self._check_numel("all_to_all_v", "source", source, sum(source_counts))
        self._counters.all_to_all_v.calls += 1
        self._counters.all_to_all_v.payload_bytes += source.nbytes
        return self._performer(DEFAULT_OPTIONS).start_all_to_all_v(
            output, source, output_counts, source_counts
        )

    def barrier(self) -> Work:
        """Done when every rank has called it."""
        if self.unusable is not None:
            self._refuse("barrier", None)
        self._counters.barrier.calls += 1
        return self._performer(DEFAULT_OPTIONS).start_barrier()

    # Point to point and messages.

    def send(self, tensor: torch.Tensor, dst: Rank, *, tag: int = 0) -> Work:
        """Send `tensor` to `dst`; matches its recv with the same tag, in order."""
        self._check("send", tensor, root=dst)
        self._counters.send.calls += 1
        self._counters.send.payload_bytes += tensor.nbytes
        self.ledger.own_bytes += tensor.nbytes if dst == self.rank else 0
        return self.start_send(tensor, dst, tag)

    def recv(self, tensor: torch.Tensor, src: Rank | None = None, *, tag: int = 0) -> Work:
        """Receive into `tensor` from `src`, or from any rank."""
        self._check("recv", tensor, root=0 if src is None else src)
        self._counters.recv.calls += 1
        return self.start_recv(tensor, src, tag)

    def serve(self, channel: str, handler: Handler) -> None:
        """Answer messages on `channel` with `handler`, which must not wait. A channel is served once."""
        if channel in self._served:
            raise ConfigError(f"{self.who()}: serve({channel!r}): this channel has a handler already")
        self._served.add(channel)
        self.register_handler(channel, handler)

    def call(self, peer: Rank, channel: str, message: Message) -> Reply:
        """Send a message whose handler's answer is wanted."""
        self._check_peer("call", peer)
        reply = self.send_call(peer, channel, message)
        self._counters.call.calls += 1
        self._counters.call.payload_bytes += self._message_bytes(peer, message)
        return reply

    def post(self, peer: Rank, channel: str, message: Message) -> None:
        """Send a message without an answer."""
        self._check_peer("post", peer)
        self.send_post(peer, channel, message)
        self._counters.post.calls += 1
        self._counters.post.payload_bytes += self._message_bytes(peer, message)

    def deferred(self) -> Reply:
        """A promise that a handler returns now and sets later, e.g. when a third rank has come."""
        return Deferred("a deferred reply")

    def on_lost(self, callback: Callable[[Rank], None]) -> None:
        """Call `callback(rank)` on the message service when a peer's death is noticed."""
        self.mailbox().on_lost(callback)

    def drain(self) -> None:
        """Collective: return when every message posted before, and by its handlers, has been handled."""
        for _ in range(2):
            self.mailbox().flush()
            self.barrier().wait()
        self.mailbox().raise_stored()

    def tolerate_loss(self) -> None:
        """From now on collectives go on among the living, if `min_size` allows losses. All ranks call it."""
        if self.min_size < self.size and self._survivors is None:
            self.mailbox().gives_up_stuck_ranks = True
            self._survivors = Survivors(self.mailbox(), self.rank, self.size)
            if self.rank == 0 and self.meeting is not None and self.meeting.lost_ranks is not None:
                self.meeting.lost_ranks.tolerate()
                loss_exchange.start(self.mailbox(), self.meeting.lost_ranks)
            self.barrier().wait()  # rank 0 has a connection to every rank, and so sees it die

    def note_progress(self) -> None:
        """A minibatch has begun: peers that wait for this rank's messages need not give it up."""
        if self._open_mailbox is not None:
            self._open_mailbox.progress += 1

    def charge_compute(self, share: float = 1.0) -> None:
        """In virtual time: let `share` of one minibatch's compute time pass."""

    def off_clock(self) -> contextlib.AbstractContextManager[None]:
        """In virtual time: operations inside take no time (evaluation)."""
        return contextlib.nullcontext()

    @abc.abstractmethod
    def allocate(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Zeroed 1-D tensor in the memory that this fabric reaches best."""

    @abc.abstractmethod
    def now(self) -> float:
        """Seconds on this fabric's clock."""

    def split(self, ranks: Sequence[Rank]) -> FabricCommunicator | None:
        """A communicator of `ranks` (every rank of this one calls it); None where this rank is not named."""
        chosen = list(ranks)
        if len(set(chosen)) != len(chosen) or not all(0 <= r < self.size for r in chosen) or not chosen:
            raise ConfigError(f"{self.who()}: split({chosen}): distinct ranks below {self.size} expected")
        if self.unusable is not None:
            self._refuse("split", None)
        return self.make_part(chosen)

    def close(self, *, goodbye: bool = True) -> None:
        """Release what the fabric holds; idempotent. Without a goodbye, peers take this rank for lost."""
        if self.unusable != "it was closed":
            if self._open_mailbox is not None:
                # After a failure a peer may be out of reach: what is queued for it is not waited for.
                self._open_mailbox.close(10.0 if goodbye else 1.0, goodbye=goodbye)
            self.unusable = "it was closed"
            self.release()

    # What a fabric implements beside the operations.

    @abc.abstractmethod
    def make_part(self, ranks: list[Rank]) -> FabricCommunicator | None:
        """`split` on valid arguments: distinct ranks of this communicator, in the new order."""

    @abc.abstractmethod
    def release(self) -> None:
        """Give back what the fabric holds; called once, by `close`."""

    def lane(self, priority: int) -> FabricOperations:
        """Who performs operations of this priority; only a fabric that has priorities is asked."""
        raise ConfigError(
            f"{self.who()}: the {self.fabric} fabric has no priorities, got priority={priority}"
        )

    def check_algorithm(self, operation: str, algorithm: str) -> None:
        """ConfigError unless `operation` can run `algorithm` here."""
        raise ConfigError(
            f"{self.who()}: {operation}: algorithm={algorithm!r}: the {self.fabric} fabric chooses by itself"
        )

    def mailbox(self) -> Mailbox:
        """This rank's message service, made when it is first needed."""
        if self._open_mailbox is None:
            if self.meeting is None:
                raise CommError(
                    f"{self.who()}: messages need a communicator of the whole job, not a part of it"
                )
            self._open_mailbox = mailbox.open(self.meeting, self.ledger)
            self._open_mailbox.on_lost(self._lose)
        return self._open_mailbox

    def _lose(self, peer: Rank) -> None:
        """On the message service. Without permission to go on, every call that waits fails, of any peer."""
        if self._survivors is not None or self.unusable is not None:
            return
        why = self.mailbox().why_lost(peer)
        self.unusable = f"rank {peer} is lost ({why}), and the job may not go on without it"
        self.mailbox().give_up(f"{self.who()}: {self.unusable}; see --min-workers")

    def register_handler(self, channel: str, handler: Handler) -> None:
        """`serve`, for a fabric to override."""
        self.mailbox().serve(channel, handler)

    def send_call(self, peer: Rank, channel: str, message: Message) -> Reply:
        """`call`, unchecked and uncounted."""
        return self.mailbox().call(peer, channel, message)

    def send_post(self, peer: Rank, channel: str, message: Message) -> None:
        """`post`, unchecked and uncounted."""
        self.mailbox().post(peer, channel, message)

    def who(self) -> str:
        """This rank as errors name it."""
        return f"rank {self.rank} (host {self.hosts[self.rank]})"

    def _options(self, name: str, algorithm: str | None, priority: int) -> CallOptions:
        if algorithm is None and not priority:
            return DEFAULT_OPTIONS
        if isinstance(priority, bool) or not isinstance(priority, int) or priority < 0:
            raise ConfigError(f"{self.who()}: {name}: priority={priority!r}: a whole number >= 0 expected")
        if algorithm is not None:
            self.check_algorithm(name, algorithm)
        return CallOptions(algorithm, priority)

    def _performer(self, options: CallOptions) -> FabricOperations | Survivors:
        """Who performs an operation: the survivors' protocol, a lane for urgent ones, or this fabric."""
        if self._survivors is not None:
            return self._survivors
        return self.lane(options.priority) if options.priority else self

    def _message_bytes(self, peer: Rank, message: Message) -> int:
        """Payload of a message; what a rank sends to itself is noted, as it leaves through no link."""
        num_bytes = sum(t.nbytes for t in message.tensors)
        if peer == self.rank:
            self.ledger.own_bytes += num_bytes
        return num_bytes

    # Checks.

    def _refuse(self, name: str, tensor: torch.Tensor | None) -> NoReturn:
        if self.unusable is not None:
            raise CommError(f"{self.who()}: {name}: this communicator cannot be used: {self.unusable}")
        assert tensor is not None
        raise ConfigError(
            f"{self.who()}: {name}: a contiguous tensor expected, got shape {tuple(tensor.shape)}"
            f" with strides {tensor.stride()}; pass tensor.contiguous()"
        )

    def _check(
        self, name: str, tensor: torch.Tensor, other: torch.Tensor | None = None, *, root: Rank = 0
    ) -> None:
        if self.unusable is not None or not tensor.is_contiguous():
            self._refuse(name, tensor)
        if not 0 <= root < self.size:
            raise ConfigError(f"{self.who()}: {name}: rank {root} named; the job has 0..{self.size - 1}")
        if other is not None:
            if not other.is_contiguous():
                self._refuse(name, other)
            if other.dtype != tensor.dtype or other.device != tensor.device:
                raise ConfigError(
                    f"{self.who()}: {name}: output and source must agree, got"
                    f" {other.dtype} on {other.device} and {tensor.dtype} on {tensor.device}"
                )

    def _check_op(self, name: str, tensor: torch.Tensor, op: object) -> None:
        if not isinstance(op, ReduceOp):
            known = ", ".join(ReduceOp.__members__)
            raise ConfigError(f"{self.who()}: {name}: op must be a paceline.ReduceOp ({known}), got {op!r}")
        if op in _BITWISE and (tensor.is_floating_point() or tensor.is_complex()):
            raise ConfigError(f"{self.who()}: {name}: {op.name} needs integers or bool, got {tensor.dtype}")
        if op is ReduceOp.MEAN and tensor.dtype == torch.bool:
            raise ConfigError(f"{self.who()}: {name}: MEAN of bool is not defined; use BOR, BAND or SUM")

    def _check_counts(self, name: str, argument: str, counts: Sequence[int]) -> None:
        if len(counts) != self.size or min(counts) < 0:
            raise ConfigError(
                f"{self.who()}: {name}: {argument} needs {self.size} numbers >= 0, got {list(counts)}"
            )

    def _check_numel(self, name: str, argument: str, tensor: torch.Tensor | None, numel: int) -> None:
        if tensor is None or tensor.numel() != numel:
            got = "None" if tensor is None else f"{tensor.numel()} elements"
            raise ConfigError(f"{self.who()}: {name}: {argument} must have {numel} elements, got {got}")

    def _check_peer(self, name: str, peer: Rank) -> None:
        if self.unusable is not None:
            self._refuse(name, None)
        if not 0 <= peer < self.size:
            raise ConfigError(f"{self.who()}: {name}: rank {peer} named; the job has 0..{self.size - 1}")
