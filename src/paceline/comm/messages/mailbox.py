"""Messages between processes: `serve`, `call` and `post` over this package's own authenticated sockets.

One service thread per process owns the sockets and runs all handlers, one at a time, so a handler needs no
lock and must not block: it does not wait, it answers with None, a Message, or a Deferred that it sets later.

Back-pressure: a thread that posts waits while its outbox to that peer is full. The service thread never waits
(handlers may post and answer beyond the limit), otherwise two full outboxes would stop each other for ever.

Who dies is noticed: a connection that ends without a goodbye fails the calls that wait on it (PeerLost) and
tells those who asked by `on_lost`.

End of run: `flush` returns when every peer has handled all that was posted to it; then `close`.
"""

from __future__ import annotations

import atexit
import itertools
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, Protocol

from paceline.comm.ledger import Ledger
from paceline.comm.messages import framing
from paceline.comm.messages.channels import Channels
from paceline.comm.messages.reply import Deferred
from paceline.comm.messages.service import Service
from paceline.comm.messages.shared_blocks import LEAST_BYTES, Lender
from paceline.comm.rendezvous.meeting import Meeting
from paceline.errors import CommError, ConfigError, PeerLost, Timeout
from paceline.types import Handler, Message

OUTBOX_BYTES = 64 << 20


def open(meeting: Meeting, ledger: Ledger) -> Mailbox:
    """The mailbox of one rank of a job: addresses travel through the job's store."""
    return Mailbox(
        rank=meeting.rank,
        size=meeting.size,
        secret=meeting.secret,
        directory=_StoreDirectory(meeting.store),
        host=meeting.address or "127.0.0.1",
        ledger=ledger,
    )


class _StoreDirectory:
    def __init__(self, store: Any) -> None:
        self._store = store

    def publish(self, rank: int, address: str) -> None:
        self._store.set(f"mailbox/{rank}", address)

    def lookup(self, rank: int) -> str | None:
        key = f"mailbox/{rank}"
        return str(self._store.get(key).decode()) if self._store.check([key]) else None


class Directory(Protocol):
    """Where ranks publish the address of their mailbox: a TCPStore, or a dict in tests."""

    def publish(self, rank: int, address: str) -> None:
        """Tell everybody where `rank` listens."""

    def lookup(self, rank: int) -> str | None:
        """Return the address of `rank`, or None if it has not published one yet."""


class Mailbox:
    """This rank's end of all message channels."""

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
        if len(secret) < 16:
            raise ConfigError(f"the job's secret has {len(secret)} bytes; at least 16 are needed")
        self.rank, self.size = rank, size
        self._timeout_s, self._outbox_limit = timeout_s, outbox_bytes
        self._max_payload_bytes = max_payload_bytes
        self._ledger = ledger or Ledger()
        self._ids = itertools.count(1)
        self._room = threading.Condition()
        self._pending: dict[int, tuple[int, Deferred]] = {}
        self._lost: dict[int, str] = {}
        self._on_lost: list[Callable[[int], None]] = []
        self._on_left: list[Callable[[int], None]] = []
        self._posted_to: set[int] = set()
        self._is_closed = False
        self._pid = os.getpid()
        self._channels = Channels(rank)
        self._lender, self._least_shared_bytes = Lender(), least_shared_bytes
        self._service = Service(
            rank=rank,
            size=size,
            secret=secret,
            directory=directory,
            host=host,
            timeout_s=timeout_s,
            max_payload_bytes=max_payload_bytes,
            room=self._room,
            on_frame=self._frame,
            on_peer_lost=self._peer_lost,
            on_peer_left=self._peer_left,
            is_lending=self._lender.is_lending,
        )
        self.address = self._service.address
        directory.publish(rank, f"{self.address} {self._service.place}")
        self._service.start()
        _close_at_exit(self)

    def serve(self, channel: str, handler: Handler) -> None:
        """Run `handler(src, message)` on the service thread for every message on `channel`.

        Messages that came before are handed over first, in order. Serving again replaces the handler.
        """
        self._check_usable()
        self._service.run(lambda: self._channels.serve(channel, handler))

    def call(self, peer: int, channel: str, message: Message) -> Deferred:
        """Send `message` and return the promise of its answer."""
        self._check_peer(peer)
        framing.check(message)
        reply = Deferred(f"rank {self.rank}: call on channel {channel!r} to rank {peer}", self._ledger)
        if peer == self.rank:
            self._deliver_to_self(channel, message, reply)
            return reply
        id = next(self._ids)
        with self._room:
            self._pending[id] = (peer, reply)
        try:
            self._enqueue(peer, *self._encode(peer, framing.REQUEST, id, channel, message))
        except CommError:
            with self._room:
                self._pending.pop(id, None)
            raise
        return reply

    def post(self, peer: int, channel: str, message: Message) -> None:
        """Send `message` and expect no answer. Waits only while the outbox to `peer` is full."""
        self._check_peer(peer)
        framing.check(message)
        if peer == self.rank:
            self._deliver_to_self(channel, message, None)
            return
        self._posted_to.add(peer)
        self._enqueue(peer, *self._encode(peer, framing.POST, 0, channel, message))

    def on_lost(self, callback: Callable[[int], None]) -> None:
        """Call `callback(rank)` on the service thread when a peer's connection breaks."""
        self._service.run(lambda: self._add_watcher(callback))

    def on_left(self, callback: Callable[[int], None]) -> None:
        """Call `callback(rank)` on the service thread when a peer has said goodbye and hung up."""
        self._service.run(lambda: self._on_left.append(callback))

    def declare_lost(self, peer: int, why: str) -> None:
        """Treat `peer` as lost: somebody else noticed its death. To be called by handlers."""
        self._peer_lost(peer, why)

    def flush(self, timeout_s: float | None = None) -> None:
        """Return when every live peer has handled all messages posted to it so far."""
        self._check_usable()
        replies = []
        for peer in sorted(self._posted_to - set(self._lost)):
            id, reply = next(self._ids), Deferred(f"rank {self.rank}: flush of messages to rank {peer}")
            with self._room:
                self._pending[id] = (peer, reply)
            self._enqueue(peer, framing.signal(framing.FLUSH, id))
            replies.append(reply)
        own = Deferred(f"rank {self.rank}: flush of its own messages")
        self._service.run(lambda: own.set(Message()))
        for reply in [*replies, own]:
            try:
                reply.wait(self._timeout_s if timeout_s is None else timeout_s)
            except PeerLost:
                continue

    def raise_stored(self) -> None:
        """Raise the error of a posted message's handler here, once; there is nobody else to tell."""
        self._channels.raise_stored()

    def close(self, timeout_s: float = 10.0, *, goodbye: bool = True) -> None:
        """Say goodbye, send what is queued, stop and join the service thread. Idempotent.

        Without the goodbye, peers take it for a death: for those who leave in the middle of their work.
        """
        with self._room:
            if self._is_closed:
                return
            self._is_closed = True
        if os.getpid() == self._pid and threading.current_thread() is not self._service.thread:
            self._service.stop(timeout_s, goodbye=goodbye)
        self._fail_pending(lambda peer: CommError(f"rank {self.rank}: the communicator was closed"))
        self._lender.close()
        _open_mailboxes.discard(self)

    # -- sending, on the caller's thread -------------------------------------------------------------------

    def _encode(
        self, peer: int, kind: int, id: int, channel: str, message: Message
    ) -> tuple[list[memoryview], int | None]:
        """The frame, and the block of shared memory that is lent with it, if any."""
        if peer in self._service.near and framing.num_bytes(message) >= self._least_shared_bytes:
            fd = self._lender.lend(peer, message.tensors)
            if fd is not None:
                return framing.encode(kind, id, channel, message, (os.getpid(), fd)), fd
        return framing.encode(kind, id, channel, framing.owned(message)), None

    def _enqueue(self, peer: int, frame: list[memoryview], block: int | None = None) -> None:
        try:
            self._append(peer, frame, block)
        except CommError:
            if block is not None:
                self._lender.take_back(peer, block)
            raise

    def _append(self, peer: int, frame: list[memoryview], block: int | None) -> None:
        size = sum(len(b) for b in frame)
        on_service = threading.current_thread() is self._service.thread
        with self._room:
            deadline = time.monotonic() + self._timeout_s
            while True:
                if peer in self._lost:
                    raise PeerLost(f"rank {self.rank}: rank {peer} is lost: {self._lost[peer]}")
                queued = self._service.queued_bytes(peer) + self._lender.lent_bytes(peer, but=block)
                if on_service or queued == 0 or queued + size <= self._outbox_limit:
                    break
                if not self._room.wait(max(0.0, deadline - time.monotonic())):
                    raise Timeout(
                        f"rank {self.rank}: outbox to rank {peer} stayed full ({queued} bytes) for "
                        f"{self._timeout_s:g} s. Is that rank alive, and do its handlers return?"
                    )
            self._service.append(peer, frame)
        self._service.wake()

    def _deliver_to_self(self, channel: str, message: Message, reply: Deferred | None) -> None:
        copy = framing.owned(message)

        def answer(outcome: Message | BaseException) -> None:
            assert reply is not None
            if isinstance(outcome, Message):
                self._count_answer(outcome)
                reply.set(framing.owned(outcome))
            else:
                reply.fail(_handler_error(self.rank, channel, str(outcome)))

        self._service.run(
            lambda: self._channels.deliver(self.rank, channel, copy, answer if reply is not None else None)
        )

    # -- receiving, on the service thread ------------------------------------------------------------------

    def _frame(self, src: int, kind: int, id: int, channel: str, message: Message) -> None:
        if kind == framing.POST:
            self._channels.deliver(src, channel, message, None)
        elif kind == framing.REQUEST:
            self._channels.deliver(
                src, channel, message, lambda outcome: self._answer(src, id, channel, outcome)
            )
        elif kind == framing.RETURNED:
            self._lender.take_back(src, id)
            with self._room:
                self._room.notify_all()
        elif kind == framing.FLUSH:
            self._service.reply(src, framing.signal(framing.FLUSHED, id))
        else:
            with self._room:
                peer, reply = self._pending.get(id, (-1, None))
                if reply is None or peer != src:
                    return
                del self._pending[id]
            if kind == framing.ERROR:
                reply.fail(_handler_error(src, channel, str(message.header.get("error", ""))))
            else:
                reply.set(message)

    def _answer(self, src: int, id: int, channel: str, outcome: Message | BaseException) -> None:
        """Send an outcome back; on whichever thread sets it."""
        if self._is_closed and not isinstance(outcome, Message):
            return  # the handler failed because this rank is leaving: that is what the peer will see
        try:
            if isinstance(outcome, Message):
                framing.check(outcome)
                self._count_answer(outcome)
                frame, _ = self._encode(src, framing.ANSWER, id, channel, outcome)
            else:
                raise outcome
        except Exception as error:
            text = f"{type(error).__name__}: {error}"[:4000]
            frame = framing.encode(framing.ERROR, id, channel, Message({"error": text}))
        self._service.reply(src, frame)

    def _peer_lost(self, peer: int, why: str) -> None:
        self._lender.forget(peer)
        with self._room:
            if peer in self._lost or self._is_closed:
                return
            self._lost[peer] = why
            self._room.notify_all()
        self._fail_pending(
            lambda p: PeerLost(f"rank {self.rank}: rank {p} is lost: {why}") if p == peer else None
        )
        for callback in list(self._on_lost):
            callback(peer)

    def _peer_left(self, peer: int) -> None:
        """It said goodbye. What it was asked and has not answered, nobody will answer."""
        self._lender.forget(peer)
        self._fail_pending(
            lambda p: PeerLost(f"rank {self.rank}: rank {p} has left the job") if p == peer else None
        )
        for callback in list(self._on_left):
            callback(peer)

    def _add_watcher(self, callback: Callable[[int], None]) -> None:
        self._on_lost.append(callback)
        for peer in sorted(self._lost):
            callback(peer)

    def _fail_pending(self, error_for: Callable[[int], CommError | None]) -> None:
        with self._room:
            doomed = [(i, r, e) for i, (p, r) in self._pending.items() if (e := error_for(p)) is not None]
            for i, _, _ in doomed:
                del self._pending[i]
        for _, reply, error in doomed:
            reply.fail(error)

    def _count_answer(self, message: Message) -> None:
        entry = self._ledger.operations["answer"]
        entry.calls += 1
        entry.payload_bytes += framing.num_bytes(message)

    def _check_usable(self) -> None:
        if self._is_closed or os.getpid() != self._pid:
            raise CommError(f"rank {self.rank}: the communicator was closed (or this is a forked child)")

    def _check_peer(self, peer: int) -> None:
        if not 0 <= peer < self.size:
            raise ConfigError(f"rank {self.rank}: no rank {peer} in a communicator of {self.size}")
        self._check_usable()
        if threading.current_thread() is not self._service.thread:
            self._channels.raise_stored()


def _handler_error(peer: int, channel: str, text: str) -> CommError:
    return CommError(f"rank {peer}: handler of channel {channel!r} failed: {text}")


_open_mailboxes: weakref.WeakSet[Mailbox] = weakref.WeakSet()


def _close_at_exit(mailbox: Mailbox) -> None:
    _open_mailboxes.add(mailbox)


@atexit.register
def _close_all() -> None:
    for mailbox in list(_open_mailboxes):
        mailbox.close(timeout_s=2.0)


def _forget_in_child() -> None:
    # A forked child would keep the sockets open and hide its parent's death from the peers.
    for mailbox in list(_open_mailboxes):
        mailbox._service.abandon()
    _open_mailboxes.clear()


os.register_at_fork(after_in_child=_forget_in_child)
