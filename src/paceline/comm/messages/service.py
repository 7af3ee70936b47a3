"""The service thread of a mailbox: listens, connects on demand, authenticates, moves bytes.

Each ordered pair of ranks has one connection, opened by the rank that sends requests; answers return on it.
Strangers get little: connections that have not proved the secret are limited in number, bytes and seconds.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from paceline.comm.messages import framing, shared_blocks
from paceline.comm.messages.authentication import Acceptor, Initiator
from paceline.comm.messages.connection import Connection
from paceline.errors import ProtocolError
from paceline.types import Message

STRANGERS = 64
HANDSHAKE_S = 10.0
_TICK_S = 0.5


class Service:
    """Sockets and one thread. All public methods may be called from any thread unless they say otherwise."""

    def __init__(
        self,
        *,
        rank: int,
        size: int,
        secret: bytes,
        directory: Any,
        host: str,
        timeout_s: float,
        max_payload_bytes: int,
        room: threading.Condition,
        on_frame: Callable[[int, int, int, str, Message], None],
        on_peer_lost: Callable[[int, str], None],
        on_peer_left: Callable[[int], None],
        is_lending: Callable[[], bool],
    ) -> None:
        self._rank, self._size, self._secret = rank, size, secret
        self._directory, self._timeout_s = directory, timeout_s
        self._max_payload_bytes = max_payload_bytes
        self._room, self._on_frame = room, on_frame
        self._on_peer_lost, self._on_peer_left = on_peer_lost, on_peer_left
        self._is_lending = is_lending
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=1024)
        self._listener.setblocking(False)
        self.address = f"{host} {self._listener.getsockname()[1]}"
        self.place = shared_blocks.place()
        self.near: set[int] = set()
        """Peers on this host, as far as known: large tensors reach them through shared memory."""
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._selector.register(self._wake_out, selectors.EVENT_READ, None)
        self._tasks: deque[Callable[[], None]] = deque()
        self._waiting: dict[int, deque[list[memoryview]]] = {}
        self._waiting_bytes: dict[int, int] = {}
        self._out: dict[int, Connection] = {}
        self._in: dict[int, Connection] = {}
        self._strangers: set[Connection] = set()
        self._stop_at: float | None = None
        self.thread = threading.Thread(target=self._loop, name=f"paceline-messages-{rank}", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self.thread.start()

    def wake(self) -> None:
        """Make the thread look at its queues."""
        with contextlib.suppress(BlockingIOError, OSError):
            self._wake_in.send(b"\0")

    def run(self, task: Callable[[], None]) -> None:
        """Run `task` on the service thread, in the order of these calls."""
        self._tasks.append(task)
        self.wake()

    def queued_bytes(self, peer: int) -> int:
        """Bytes in the outbox to `peer`. The caller holds the lock."""
        connection = self._out.get(peer)
        return self._waiting_bytes.get(peer, 0) + (connection.outbox_bytes if connection else 0)

    def append(self, peer: int, frame: list[memoryview]) -> None:
        """Queue a frame to `peer`, connecting if need be. The caller holds the lock, then calls `wake`."""
        connection = self._out.get(peer)
        if connection is not None:
            connection.append(frame)
            return
        if peer not in self._waiting:
            self._waiting[peer] = deque()
            self._waiting_bytes[peer] = 0
            threading.Thread(target=self._resolve, args=(peer,), daemon=True).start()
        self._waiting[peer].append(frame)
        self._waiting_bytes[peer] += sum(len(b) for b in frame)

    def reply(self, peer: int, frame: list[memoryview]) -> None:
        """Queue an answer on the connection that `peer` opened; dropped if it is gone."""
        with self._room:
            connection = self._in.get(peer)
            if connection is not None:
                connection.append(frame)
        self.wake()

    def stop(self, timeout_s: float, *, goodbye: bool = True) -> None:
        """Send what is queued and a goodbye, then end the thread and close everything."""
        with self._room:
            for connection in [*self._out.values(), *self._in.values()] if goodbye else []:
                connection.append(framing.signal(framing.GOODBYE))
            self._stop_at = time.monotonic() + timeout_s
        self.wake()
        self.thread.join(timeout_s + 5.0)

    def abandon(self) -> None:
        """In a forked child: close the inherited descriptors without a word to the peers."""
        for s in [self._listener, self._wake_in, self._wake_out]:
            s.close()
        for connection in [*self._out.values(), *self._in.values(), *self._strangers]:
            connection.close()

    # -- the thread ----------------------------------------------------------------------------------------

    def _loop(self) -> None:
        try:
            while not self._is_finished():
                for key, events in self._selector.select(_TICK_S):
                    if key.fileobj is self._listener:
                        self._accept()
                    elif key.fileobj is self._wake_out:
                        with contextlib.suppress(BlockingIOError):
                            self._wake_out.recv(4096)
                    elif events & selectors.EVENT_READ:
                        self._read(key.data)
                while self._tasks:
                    self._tasks.popleft()()
                self._write_all()
                self._drop_slow_strangers()
        finally:
            for connection in [*self._out.values(), *self._in.values(), *self._strangers]:
                connection.close()
            self._selector.close()
            for s in (self._listener, self._wake_in, self._wake_out):
                s.close()

    def _is_finished(self) -> bool:
        if self._stop_at is None:
            return False
        busy = [c for c in [*self._out.values(), *self._in.values()] if c.outbox_bytes]
        is_done = not busy and not self._waiting and not self._is_lending()
        return is_done or time.monotonic() >= self._stop_at

    def _resolve(self, peer: int) -> None:
        """Find a peer's address and connect; in a thread of its own, as it may have to wait for the peer."""
        deadline = time.monotonic() + self._timeout_s
        try:
            while (address := self._directory.lookup(peer)) is None:
                if time.monotonic() >= deadline or self._stop_at is not None:
                    raise TimeoutError(f"it did not publish an address within {self._timeout_s:g} s")
                time.sleep(0.01)
            host, port, place = address.split(" ")
            if place == self.place:
                self.near.add(peer)
            sock = socket.create_connection((host, int(port)), timeout=self._timeout_s)
        except Exception as error:
            why = f"cannot connect to it: {error}"
            self.run(lambda: self._forget(peer, why))
            return
        self.run(lambda: self._connected(peer, sock))

    def _connected(self, peer: int, sock: socket.socket) -> None:
        guard = Initiator(self._secret, rank=self._rank, peer=peer)
        connection = self._adopt(sock, guard)
        with self._room:
            self._out[peer] = connection
            for frame in self._waiting.pop(peer, ()):
                connection.append(frame)
            self._waiting_bytes.pop(peer, None)

    def _adopt(self, sock: socket.socket, guard: Initiator | Acceptor) -> Connection:
        connection = Connection(
            sock,
            guard,
            max_payload_bytes=self._max_payload_bytes,
            deadline=time.monotonic() + HANDSHAKE_S,
        )
        self._strangers.add(connection)
        self._selector.register(sock, selectors.EVENT_READ, connection)
        return connection

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):
            sock, _ = self._listener.accept()
            if sum(1 for c in self._strangers if c not in self._out.values()) >= STRANGERS:
                sock.close()
                return
            self._adopt(sock, Acceptor(self._secret, rank=self._rank, size=self._size))

    def _read(self, connection: Connection) -> None:
        was_ready = connection.is_ready
        try:
            for kind, id, channel, message in connection.receive():
                if connection.returns:
                    self._return(connection)
                if kind == framing.GOODBYE:
                    connection.said_goodbye = True
                else:
                    self._introduce(connection)
                    self._on_frame(connection.peer, kind, id, channel, message)
            if connection.is_ready and not was_ready:
                self._introduce(connection)
        except (OSError, ProtocolError) as error:
            self._disconnect(connection, str(error))

    def _return(self, connection: Connection) -> None:
        """Tell the peer that its blocks are free again; and that it is near, if it is news."""
        with self._room:
            for fd in connection.returns:
                connection.append(framing.signal(framing.RETURNED, fd))
        connection.returns.clear()
        self.near.add(connection.peer)

    def _introduce(self, connection: Connection) -> None:
        """The handshake is over: a stranger becomes a peer."""
        if connection in self._strangers:
            self._strangers.discard(connection)
            if self._out.get(connection.peer) is not connection:
                with self._room:
                    self._in[connection.peer] = connection

    def _write_all(self) -> None:
        for connection in [*self._out.values(), *self._in.values(), *self._strangers]:
            try:
                with self._room:
                    sent = connection.transmit()
                    if sent:
                        connection.outbox_bytes -= sent
                        self._room.notify_all()
            except OSError as error:
                self._disconnect(connection, str(error))
                continue
            wants = connection.wants_to_write()
            if wants != connection.is_watched_for_writing:
                connection.is_watched_for_writing = wants
                events = selectors.EVENT_READ | (selectors.EVENT_WRITE if wants else 0)
                self._selector.modify(connection.sock, events, connection)

    def _drop_slow_strangers(self) -> None:
        now = time.monotonic()
        for connection in [c for c in self._strangers if now > c.deadline]:
            self._disconnect(connection, f"no handshake within {HANDSHAKE_S:g} s")

    def _disconnect(self, connection: Connection, why: str) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(connection.sock)
        connection.close()
        with self._room:
            self._strangers.discard(connection)
            is_out = self._out.get(connection.peer) is connection
            is_in = self._in.get(connection.peer) is connection
            if is_out:
                del self._out[connection.peer]
            if is_in:
                del self._in[connection.peer]
            connection.outbox_bytes = 0
        if (is_out or is_in) and not connection.said_goodbye:
            self._on_peer_lost(connection.peer, why)
        elif is_out or (is_in and connection.peer not in self._out):
            # Answers come on the connection that went out: until that one has ended, some may be on the way.
            self._on_peer_left(connection.peer)

    def _forget(self, peer: int, why: str) -> None:
        with self._room:
            self._waiting.pop(peer, None)
            self._waiting_bytes.pop(peer, None)
        self._on_peer_lost(peer, why)
