"""Messages between processes: `serve`, `call` and `post` over this package's own authenticated sockets.

One service thread per process owns the sockets and runs all handlers, one at a time, so a handler needs no
lock and must not block: it does not wait, it answers with None, a Message, or a Deferred that it sets later.

Back-pressure: a thread that posts waits while its outbox to that peer is full. The service thread never waits
(handlers may post and answer beyond the limit), otherwise two full outboxes would stop each other for ever.

The death of a peer is noticed: a connection that ends without a goodbye fails the calls that wait on it
(PeerLost) and runs the callbacks given to `on_lost`.

End of run: `flush` returns when every peer has handled all that was posted to it; then `close`.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import threading
import weakref
from collections.abc import Callable

from paceline.comm.ledger import Ledger
from paceline.comm.messages import framing
from paceline.comm.messages.calls import PendingCalls
from paceline.comm.messages.channels import Channels
from paceline.comm.messages.directory import Directory, StoreDirectory
from paceline.comm.messages.framing import Buffers, Frame, FrameKind
from paceline.comm.messages.open_requests import OpenRequest, OpenRequests
from paceline.comm.messages.outboxes import Outboxes
from paceline.comm.messages.reply import Deferred, Outcome
from paceline.comm.messages.service import Service
from paceline.comm.messages.shared_blocks import LEAST_BYTES, Lender
from paceline.comm.rendezvous.meeting import Meeting
from paceline.errors import CommError, ConfigError, PeerLost, Timeout
from paceline.types import Handler, Message, named

_log = logging.getLogger("paceline")

OUTBOX_BYTES = 64 << 20


def open(meeting: Meeting, ledger: Ledger) -> Mailbox:
    """The mailbox of one rank of a job: addresses travel through the job's store."""
    return Mailbox(
        rank=meeting.rank,
        size=meeting.size,
        secret=meeting.secret,
        directory=StoreDirectory(meeting.store),
        host=meeting.address or "127.0.0.1",
        timeout_s=meeting.timeout_s,
        ledger=ledger,
    )


class Mailbox:
    """This rank's end of all message channels. Its methods may be called from any thread.

    Locks: `Outboxes` and `PendingCalls` each have one of their own, and never call back while they hold it.
    """

    def __init__(
        self,
        *,
        rank: int,
        size: int,
        secret: bytes,
        directory: Directory,
        host: str = "127.0.0.1",
        timeout_s: float = 300.0,
        outbox_bytes: int = OUTBOX_BYTES,
        max_payload_bytes: int = framing.MAX_PAYLOAD_BYTES,
        least_shared_bytes: int = LEAST_BYTES,
        ledger: Ledger | None = None,
    ) -> None:
        """Listen, publish the address, and start the service thread.

        Args:
            rank: This rank.
            size: Number of ranks.
            secret: The job's secret, at least 16 bytes. Peers must prove that they know it.
            directory: Where ranks publish their addresses.
            host: Address to listen on.
            timeout_s: Seconds to wait for a peer's address, for room in an outbox, for a flush, and for an
                answer. A peer from which nothing comes for half of it, no heartbeat either, is lost.
            outbox_bytes: Bytes that may wait for one peer before `post` and `call` wait.
            max_payload_bytes: Larger messages are refused, and end the connection they come on.
            least_shared_bytes: Tensors of at least this size reach peers on this host through shared memory.
            ledger: Where answers and waiting time are counted.

        Raises:
            ConfigError: The secret is too short.
        """
        if len(secret) < 16:
            raise ConfigError(f"the job's secret has {len(secret)} bytes; at least 16 are needed")
        self.rank, self.size = rank, size
        self._timeout_s = timeout_s
        self._ledger = ledger or Ledger()
        self._calls = PendingCalls()
        self._channels = Channels(rank)
        self._lender, self._least_shared_bytes = Lender(), least_shared_bytes
        self._outboxes = Outboxes(rank, self._lender, limit_bytes=outbox_bytes, timeout_s=timeout_s)
        self._requests = OpenRequests(size, timeout_s)
        self._own_ids = itertools.count(1)
        self._own_replies: dict[OpenRequest, Deferred] = {}
        self.progress = 0
        """Counts what this rank has got done; the owner of the mailbox may add to it."""
        self.gives_up_stuck_ranks = False
        """Whether ranks that are alive and make no progress are lost, instead of failing those that wait."""
        self._on_lost: list[Callable[[int], None]] = []
        self._on_left: list[Callable[[int], None]] = []
        self._has_given_up = False
        self._failure = ""
        self._posted_to: set[int] = set()
        self._pid = os.getpid()
        self._service = Service(
            rank=rank,
            size=size,
            secret=secret,
            directory=directory,
            host=host,
            timeout_s=timeout_s,
            max_payload_bytes=max_payload_bytes,
            outboxes=self._outboxes,
            on_frame=self._received,
            on_peer_lost=self.declare_lost,
            on_peer_left=self._peer_left,
            on_tick=self._look_after_requests,
            progress=lambda: self.progress,
            may_stop=lambda: not self._lender.is_lending(),
            on_failure=self._service_failed,
        )
        self.address = self._service.address
        directory.publish(rank, f"{self.address} {self._service.memory_domain}")
        self._service.start()
        _open_mailboxes.add(self)

    def serve(self, channel: str, handler: Handler) -> None:
        """Run `handler(src, message)` on the service thread for every message on `channel`.

        Messages that came before are handed over first, in order. Serving again replaces the handler.
        """
        self._check_usable()
        self._service.run(lambda: self._channels.serve(channel, handler))

    def call(self, peer: int, channel: str, message: Message) -> Deferred:
        """Send `message` and return the promise of its answer. Waits only while the outbox is full.

        Raises ConfigError for a message that cannot be sent, PeerLost, Timeout, and CommError after `close`.
        """
        self._check_sendable(peer, message)
        self.progress += 1
        what = f"rank {self.rank}: call on channel {channel!r} to rank {peer}"
        reply = Deferred(what, self._ledger, timeout_s=self._timeout_s)
        if peer == self.rank:
            self._deliver_to_self(channel, message, reply)
            return reply
        id = self._calls.add(peer, reply)
        try:
            self._send_message(peer, FrameKind.REQUEST, id, channel, message)
        except CommError:
            self._calls.withdraw(id)
            raise
        return reply

    def post(self, peer: int, channel: str, message: Message) -> None:
        """Send `message` and expect no answer. Waits only while the outbox to `peer` is full.

        Raises as `call`.
        """
        self._check_sendable(peer, message)
        self.progress += 1
        if peer == self.rank:
            self._deliver_to_self(channel, message, None)
            return
        self._posted_to.add(peer)
        self._send_message(peer, FrameKind.POST, 0, channel, message)

    def on_lost(self, callback: Callable[[int], None]) -> None:
        """Call `callback(rank)` on the service thread when a peer's connection breaks, or has broken."""
        self._service.run(lambda: self._add_loss_callback(callback))

    def on_left(self, callback: Callable[[int], None]) -> None:
        """Call `callback(rank)` on the service thread when a peer has said goodbye and hung up."""
        self._service.run(lambda: self._on_left.append(callback))

    def declare_lost(self, peer: int, why: str) -> None:
        """Treat `peer` as lost, whether its connection broke or another rank noticed its death.

        To be called on the service thread: by the service and by handlers.
        """
        self._lender.forget(peer)
        if not self._outboxes.mark_lost(peer, why):
            return
        self._calls.fail(lambda: PeerLost(f"rank {self.rank}: rank {peer} is lost: {why}"), peer)
        self._tell(self._on_lost, peer, "lost")

    def give_up(self, why: str) -> None:
        """All who wait for an answer, here or from this rank, get a CommError. On the service thread."""
        self._has_given_up = True
        self._calls.fail(lambda: CommError(why))
        for request in self._requests.open():
            self._fail_request(request, CommError(why))

    def report_ended(self, peer: int) -> None:
        """The launcher says that the process of `peer` has ended. From any thread."""
        self._service.run(lambda: self.declare_lost(peer, "its process has ended"))

    def why_lost(self, peer: int) -> str:
        """The reason why `peer` is lost; "" if it is not."""
        return self._outboxes.why_lost(peer)

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._outboxes.is_closed

    def flush(self, timeout_s: float | None = None) -> None:
        """Return when every live peer has handled all messages posted to it so far."""
        self._check_usable()
        replies = []
        for peer in sorted(self._posted_to.difference(self._outboxes.lost())):
            reply = Deferred(f"rank {self.rank}: flush of messages to rank {peer}")
            id = self._calls.add(peer, reply)
            self._send_frame(peer, framing.signal(FrameKind.FLUSH, id))
            replies.append(reply)
        own = Deferred(f"rank {self.rank}: flush of its own messages")
        self._service.run(lambda: own.set(Message()))
        for reply in [*replies, own]:
            try:
                reply.wait(self._timeout_s if timeout_s is None else timeout_s)
            except PeerLost:
                continue

    def raise_stored(self) -> None:
        """Raise the error of a posted message's handler, or of a callback, on this rank, once."""
        self._channels.raise_stored()

    def close(self, timeout_s: float = 10.0, *, goodbye: bool = True) -> None:
        """Say goodbye, send what is queued, stop and join the service thread. Idempotent.

        Args:
            timeout_s: Seconds for sending what is queued.
            goodbye: False to leave in the middle of the work: peers then take this rank for dead.
        """
        if not self._outboxes.close() and not self._failure:
            return
        if os.getpid() == self._pid and threading.current_thread() is not self._service.thread:
            self._service.stop(timeout_s, goodbye=goodbye)
        self._calls.fail(lambda: CommError(f"rank {self.rank}: the communicator was closed"))
        self._lender.close()
        _open_mailboxes.discard(self)

    def abandon(self) -> None:
        """In a forked child: close the inherited descriptors and say nothing to the peers."""
        self._service.abandon()

    # Sending, on the caller's thread

    def _send_message(self, peer: int, kind: FrameKind, id: int, channel: str, message: Message) -> None:
        frame, block = self._encode(peer, kind, id, channel, message)
        try:
            self._send_frame(peer, frame, block)
        except CommError:
            if block is not None:
                self._lender.take_back(peer, block)
            raise

    def _send_frame(self, peer: int, frame: Buffers, block: int | None = None) -> None:
        may_wait = threading.current_thread() is not self._service.thread
        if self._outboxes.add_request(peer, frame, block, may_wait=may_wait):
            self._service.connect(peer)
        self._service.wake()

    def _encode(
        self, peer: int, kind: FrameKind, id: int, channel: str, message: Message
    ) -> tuple[Buffers, int | None]:
        """The frame, and the block of shared memory that is lent with it, if any."""
        if peer in self._service.near and framing.num_bytes(message) >= self._least_shared_bytes:
            block = self._lender.lend(peer, message.tensors)
            if block is not None:
                return framing.encode(kind, id, channel, message, (os.getpid(), block)), block
        return framing.encode(kind, id, channel, framing.owned(message)), None

    def _deliver_to_self(self, channel: str, message: Message, reply: Deferred | None) -> None:
        copy = framing.owned(message)
        request = OpenRequest(self.rank, next(self._own_ids), channel)
        if reply is not None:
            self._own_replies[request] = reply
            self._requests.add(request)

        def answer(outcome: Outcome) -> None:
            assert reply is not None
            self._requests.discard(request)
            self._own_replies.pop(request, None)
            if isinstance(outcome, Message):
                self._count_answer(outcome)
                self._ledger.own_bytes += framing.num_bytes(outcome)
                reply.set(framing.owned(outcome))
            else:
                reply.fail(_handler_error(self.rank, channel, str(outcome)))

        self._service.run(
            lambda: self._channels.deliver(self.rank, channel, copy, answer if reply is not None else None)
        )

    # Receiving, on the service thread

    def _received(self, src: int, frame: Frame) -> None:
        kind, id, channel, message = frame
        self._requests.note_progress(src, id if kind == FrameKind.HEARTBEAT else None)
        if kind == FrameKind.POST:
            self._channels.deliver(src, channel, message, None)
        elif kind == FrameKind.REQUEST:
            self._requests.add(OpenRequest(src, id, channel))
            self._channels.deliver(
                src, channel, message, lambda outcome: self._answer(src, id, channel, outcome)
            )
        elif kind == FrameKind.RETURNED:
            self._lender.take_back(src, id)
            self._outboxes.notify()
        elif kind == FrameKind.HEARTBEAT:
            pass  # noted above
        elif kind == FrameKind.PENDING:
            self._calls.extend(id, src)
        elif kind == FrameKind.FLUSH:
            self._send_answer(src, framing.signal(FrameKind.FLUSHED, id))
        else:
            reply = self._calls.take(id, src)
            if reply is None:
                return
            if kind == FrameKind.ERROR:
                reply.fail(_handler_error(src, channel, str(message.header.get("error", ""))))
            else:
                reply.set(message)

    def _answer(self, src: int, id: int, channel: str, outcome: Outcome) -> None:
        """Send an outcome back; on whichever thread sets it."""
        self._requests.discard(OpenRequest(src, id, channel))
        if self._outboxes.is_closed and not isinstance(outcome, Message):
            return  # the handler failed because this rank is leaving, which is what the peer will see
        try:
            if isinstance(outcome, Message):
                framing.check(outcome)
                self._count_answer(outcome)
                frame, _ = self._encode(src, FrameKind.ANSWER, id, channel, outcome)
            else:
                raise outcome
        except Exception as error:
            text = f"{type(error).__name__}: {error}"[:4000]
            frame = framing.encode(FrameKind.ERROR, id, channel, Message({"error": text}))
        self._send_answer(src, frame)

    def _send_answer(self, peer: int, frame: Buffers) -> None:
        self._outboxes.add_answer(peer, frame)
        self._service.wake()

    def _look_after_requests(self) -> None:
        """Nobody waits for a rank that is stuck, and nobody gives up while all make progress."""
        late = self._requests.late()
        if not late:
            return
        self._requests.note_progress(self.rank, self.progress)
        gone = {*self._outboxes.lost(), *self._service.departed}
        stuck = [rank for rank in self._requests.stuck() if rank not in gone]
        if self.gives_up_stuck_ranks and stuck and self.rank not in stuck:
            for rank in stuck:
                self.declare_lost(rank, f"it has got nothing done for {self._timeout_s:g} s")
        for request in late:
            if stuck and not (self.gives_up_stuck_ranks and self.rank not in stuck):
                self._fail_late(request, stuck)
            elif request in self._own_replies:
                self._own_replies[request].extend()
            elif request.source != self.rank:
                self._send_answer(request.source, framing.signal(FrameKind.PENDING, request.id))

    def _fail_late(self, request: OpenRequest, stuck: list[int]) -> None:
        text = f"{named(stuck)} got nothing done for {self._timeout_s:g} s: waiting, or stuck?"
        self._fail_request(request, Timeout(text))

    def _fail_request(self, request: OpenRequest, error: CommError) -> None:
        own = self._own_replies.pop(request, None)
        if own is not None:
            self._requests.discard(request)
            own.fail(error)
        else:
            self._answer(request.source, request.id, request.channel, error)

    def _peer_left(self, peer: int) -> None:
        """It said goodbye: what it was asked and has not answered will not be answered."""
        self._lender.forget(peer)
        self._calls.fail(lambda: PeerLost(f"rank {self.rank}: rank {peer} has left the job"), peer)
        self._tell(self._on_left, peer, "gone")

    def _add_loss_callback(self, callback: Callable[[int], None]) -> None:
        self._on_lost.append(callback)
        for peer in self._outboxes.lost():
            self._tell([callback], peer, "lost")

    def _tell(self, callbacks: list[Callable[[int], None]], peer: int, event: str) -> None:
        """Run callbacks about a peer. One that fails must end neither the others nor the service thread."""
        for callback in list(callbacks):
            try:
                callback(peer)
            except Exception as error:
                if not (self._has_given_up and isinstance(error, CommError)):
                    self._channels.store(f"a callback failed when rank {peer} was {event}", error)

    def _count_answer(self, message: Message) -> None:
        entry = self._ledger.operations["answer"]
        entry.calls += 1
        entry.payload_bytes += framing.num_bytes(message)

    def _service_failed(self, error: Exception) -> None:
        """The service thread ends: nobody may wait for it, here or elsewhere."""
        self._failure = f"rank {self.rank}: the message service failed: {type(error).__name__}: {error}"
        _log.error("%s", self._failure, exc_info=error)
        self._outboxes.close()
        self._calls.fail(lambda: CommError(self._failure))
        self._lender.close()

    def _check_usable(self) -> None:
        if self._failure:
            raise CommError(self._failure)
        if self._outboxes.is_closed or os.getpid() != self._pid:
            raise CommError(f"rank {self.rank}: the communicator was closed (or this is a forked child)")

    def _check_sendable(self, peer: int, message: Message) -> None:
        if not 0 <= peer < self.size:
            raise ConfigError(f"rank {self.rank}: no rank {peer} in a communicator of {self.size}")
        self._check_usable()
        if threading.current_thread() is not self._service.thread:
            self._channels.raise_stored()
        framing.check(message)


def _handler_error(peer: int, channel: str, text: str) -> CommError:
    return CommError(f"rank {peer}: handler of channel {channel!r} failed: {text}")


_open_mailboxes: weakref.WeakSet[Mailbox] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for mailbox in list(_open_mailboxes):
        mailbox.close(timeout_s=2.0)


def _forget_in_child() -> None:
    # A forked child would keep the sockets open and hide its parent's death from the peers.
    for mailbox in list(_open_mailboxes):
        mailbox.abandon()
    _open_mailboxes.clear()


os.register_at_fork(after_in_child=_forget_in_child)
