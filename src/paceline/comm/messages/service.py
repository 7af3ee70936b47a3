"""The service thread of a mailbox: listens, connects on demand, authenticates, moves bytes.

Each ordered pair of ranks has one connection, opened by the rank that sends requests; answers return on it.
Connections that have not proved the secret are called strangers: they are limited in number, bytes and
seconds.

Only `Outboxes` is shared with other threads. All else here belongs to the service thread; other threads hand
it work by `run`.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable

from paceline.comm.messages import shared_blocks
from paceline.comm.messages.authentication import Acceptor, Initiator
from paceline.comm.messages.connection import PeerConnection
from paceline.comm.messages.directory import Directory
from paceline.comm.messages.framing import Frame, FrameKind, signal
from paceline.comm.messages.outboxes import Outboxes
from paceline.errors import ProtocolError

STRANGERS = 64
HANDSHAKE_S = 10.0
_TICK_S = 0.5


class Service:
    """Sockets and one thread; the methods of the first section may be called from any thread."""

    def __init__(
        self,
        *,
        rank: int,
        size: int,
        secret: bytes,
        directory: Directory,
        host: str,
        timeout_s: float,
        max_payload_bytes: int,
        outboxes: Outboxes,
        on_frame: Callable[[int, Frame], None],
        on_peer_lost: Callable[[int, str], None],
        on_peer_left: Callable[[int], None],
        may_stop: Callable[[], bool],
    ) -> None:
        """Listen on a free port of `host`; `start` starts the thread.

        Args:
            rank: This rank.
            size: Number of ranks.
            secret: The job's secret.
            directory: Where the addresses of peers are looked up.
            host: Address to listen on.
            timeout_s: Seconds to wait for a peer's address and for a connection to it.
            max_payload_bytes: Larger frames end the connection they come on.
            outboxes: The frames to send; also used by the mailbox.
            on_frame: Called with the sender and every frame that arrives.
            on_peer_lost: Called with a peer and the reason when its connection breaks or cannot be made.
            on_peer_left: Called with a peer that has said goodbye and hung up.
            may_stop: Whether `stop` may end the thread once the outboxes are empty.
        """
        self._rank, self._size, self._secret = rank, size, secret
        self._directory, self._timeout_s = directory, timeout_s
        self._max_payload_bytes = max_payload_bytes
        self._outboxes, self._may_stop = outboxes, may_stop
        self._on_frame, self._on_peer_lost, self._on_peer_left = on_frame, on_peer_lost, on_peer_left
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=1024)
        self._listener.setblocking(False)
        self.address = f"{host} {self._listener.getsockname()[1]}"
        self.memory_domain = shared_blocks.memory_domain()
        self.near: set[int] = set()
        """Peers known to be on this host: large tensors reach them through shared memory."""
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._selector.register(self._wake_out, selectors.EVENT_READ, None)
        self._tasks: deque[Callable[[], None]] = deque()
        self._strangers: set[PeerConnection] = set()
        self._stop_at: float | None = None
        self.thread = threading.Thread(target=self._loop, name=f"paceline-messages-{rank}", daemon=True)

    # Any thread

    def start(self) -> None:
        """Start the thread; call it once."""
        self.thread.start()

    def wake(self) -> None:
        """Make the thread look at its queues."""
        with contextlib.suppress(BlockingIOError, OSError):
            self._wake_in.send(b"\0")

    def run(self, task: Callable[[], None]) -> None:
        """Run `task` on the service thread, in the order of these calls."""
        self._tasks.append(task)
        self.wake()

    def connect(self, peer: int) -> None:
        """Open a connection to `peer` in the background."""
        threading.Thread(target=self._resolve, args=(peer,), daemon=True).start()

    def stop(self, timeout_s: float, *, goodbye: bool = True) -> None:
        """Send what is queued and a goodbye, then end the thread and close everything."""
        if goodbye:
            self._outboxes.add_goodbyes()
        self._stop_at = time.monotonic() + timeout_s
        self.wake()
        self.thread.join(timeout_s + 5.0)

    def abandon(self) -> None:
        """In a forked child: close the inherited descriptors and say nothing to the peers."""
        self._close_sockets()

    # The service thread

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
            self._selector.close()
            self._close_sockets()

    def _close_sockets(self) -> None:
        for connection in [*self._outboxes.connections(), *self._strangers]:
            connection.close()
        for s in (self._listener, self._wake_in, self._wake_out):
            s.close()

    def _is_finished(self) -> bool:
        if self._stop_at is None:
            return False
        is_done = self._outboxes.is_empty() and self._may_stop()
        return is_done or time.monotonic() >= self._stop_at

    def _resolve(self, peer: int) -> None:
        """Find a peer's address and connect; in a thread of its own, as it may have to wait for the peer."""
        deadline = time.monotonic() + self._timeout_s
        try:
            while (address := self._directory.lookup(peer)) is None:
                if time.monotonic() >= deadline or self._stop_at is not None:
                    raise TimeoutError(f"it did not publish an address within {self._timeout_s:g} s")
                time.sleep(0.01)
            host, port, memory_domain = address.split(" ")
            if memory_domain == self.memory_domain:
                self.near.add(peer)
            sock = socket.create_connection((host, int(port)), timeout=self._timeout_s)
        except Exception as error:
            why = f"cannot connect to it: {error}"
            self.run(lambda: self._give_up(peer, why))
            return
        self.run(lambda: self._connected(peer, sock))

    def _connected(self, peer: int, sock: socket.socket) -> None:
        guard = Initiator(self._secret, rank=self._rank, peer=peer)
        self._outboxes.attach(self._adopt(sock, guard))

    def _give_up(self, peer: int, why: str) -> None:
        self._outboxes.drop_unconnected(peer)
        self._on_peer_lost(peer, why)

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):
            sock, _ = self._listener.accept()
            if sum(not c.is_outgoing for c in self._strangers) >= STRANGERS:
                sock.close()
                return
            self._adopt(sock, Acceptor(self._secret, rank=self._rank, size=self._size))

    def _adopt(self, sock: socket.socket, guard: Initiator | Acceptor) -> PeerConnection:
        """Begin the handshake on a new socket."""
        connection = PeerConnection(
            sock,
            guard,
            max_payload_bytes=self._max_payload_bytes,
            deadline=time.monotonic() + HANDSHAKE_S,
        )
        self._strangers.add(connection)
        self._selector.register(sock, selectors.EVENT_READ, connection)
        return connection

    def _introduce(self, connection: PeerConnection) -> None:
        """The handshake is over: a stranger becomes a peer."""
        if connection in self._strangers:
            self._strangers.discard(connection)
            if not connection.is_outgoing:
                self._outboxes.attach(connection)

    def _read(self, connection: PeerConnection) -> None:
        was_ready = connection.is_ready
        try:
            for frame in connection.receive():
                if connection.returns:
                    self._return_blocks(connection)
                if frame.kind == FrameKind.GOODBYE:
                    connection.said_goodbye = True
                else:
                    self._introduce(connection)
                    self._on_frame(connection.peer, frame)
            if connection.is_ready and not was_ready:
                self._introduce(connection)
        except (OSError, ProtocolError) as error:
            self._disconnect(connection, str(error))

    def _return_blocks(self, connection: PeerConnection) -> None:
        """Tell the peer that its blocks have been read. A peer whose blocks can be read is near."""
        for descriptor in connection.returns:
            self._outboxes.add_to(connection, signal(FrameKind.RETURNED, descriptor))
        connection.returns.clear()
        self.near.add(connection.peer)

    def _write_all(self) -> None:
        for connection in [*self._outboxes.connections(), *self._strangers]:
            try:
                self._outboxes.transmit(connection)
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

    def _disconnect(self, connection: PeerConnection, why: str) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(connection.sock)
        connection.close()
        self._strangers.discard(connection)
        if not self._outboxes.detach(connection):
            return
        if not connection.said_goodbye:
            self._on_peer_lost(connection.peer, why)
        elif connection.is_outgoing or not self._outboxes.has_outgoing(connection.peer):
            # While the outgoing connection lives, answers of the peer may still arrive on it.
            self._on_peer_left(connection.peer)
