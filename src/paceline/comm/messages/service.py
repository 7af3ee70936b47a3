"""The service thread of a mailbox: listens, connects on demand, authenticates, moves bytes.

Each ordered pair of ranks has one connection, opened by the rank that sends requests; answers return on it.
Connections that have not proved the secret are called strangers: they are limited in number, bytes and
seconds. A rank whose connection is dropped before the end of its handshake connects again.

Only `Outboxes` is shared with other threads. All else here belongs to the service thread; other threads hand
it work by `run`.
"""

from __future__ import annotations

import contextlib
import random
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable

from paceline.comm.messages import shared_blocks
from paceline.comm.messages.connection import PeerConnection
from paceline.comm.messages.directory import Directory
from paceline.comm.messages.framing import Frame, FrameKind, signal
from paceline.comm.messages.outboxes import Outboxes
from paceline.comm.security.authentication import Acceptor, Initiator
from paceline.comm.security.listener import Listener
from paceline.comm.security.strangers import HANDSHAKE_S
from paceline.errors import ProtocolError

_TICK_S = 0.5
_RETRY_S = (0.1, 2.0)  # from and to
_HEARTBEAT_S = 5.0


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
        on_tick: Callable[[], None],
        progress: Callable[[], int],
        may_stop: Callable[[], bool],
        on_failure: Callable[[Exception], None],
    ) -> None:
        """Listen on a free port of `host`; `start` starts the thread.

        Args:
            rank: This rank.
            size: Number of ranks.
            secret: The job's secret.
            directory: Where the addresses of peers are looked up.
            host: Address to listen on.
            timeout_s: Seconds to wait for a peer's address, for a connection to it, and for a sign of life.
            max_payload_bytes: Larger frames end the connection they come on.
            outboxes: The frames to send; also used by the mailbox.
            on_frame: Called with the sender and every frame that arrives.
            on_peer_lost: Called with a peer and the reason when its connection breaks or cannot be made.
            on_peer_left: Called with a peer that has said goodbye and hung up.
            on_tick: Called a few times within `timeout_s`.
            progress: A number that changes while this rank makes progress.
            may_stop: Whether `stop` may end the thread once the outboxes are empty.
            on_failure: Called with what ends the thread, should anything but `stop` end it.
        """
        self._rank, self._size, self._secret = rank, size, secret
        self._directory, self._timeout_s = directory, timeout_s
        self._max_payload_bytes = max_payload_bytes
        self._outboxes, self._may_stop = outboxes, may_stop
        self._on_tick, self._progress, self._on_failure = on_tick, progress, on_failure
        self._on_frame, self._on_peer_lost, self._on_peer_left = on_frame, on_peer_lost, on_peer_left
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, 0), family=family, backlog=1024)
        self.address = f"{host} {listening.getsockname()[1]}"
        self.memory_domain = shared_blocks.memory_domain()
        self.near: set[int] = set()
        """Peers known to be on this host: large tensors reach them through shared memory."""
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._listener: Listener[PeerConnection] = Listener(
            listening,
            self._selector,
            f"rank {rank}, messages",
            adopt=self._adopt_stranger,
            read=self._meet,
            num_expected=size,
        )
        self._selector.register(self._wake_out, selectors.EVENT_READ, None)
        self._tasks: deque[Callable[[], None]] = deque()
        self._opening: dict[PeerConnection, float] = {}
        """Connections that this rank opened, until their handshake is over: since when."""
        self._connect_until: dict[int, float] = {}  # peer → deadline, while there is no connection to it
        self.departed: set[int] = set()
        """Peers that have said goodbye. Belongs to the service thread."""
        self._stop_at: float | None = None
        self._next_heartbeat = 0.0
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
        """Open a connection to `peer` in the background. Called once for each peer."""
        self._connect_until[peer] = time.monotonic() + self._timeout_s
        threading.Thread(target=self._resolve, args=(peer, 0.0), daemon=True).start()

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
                for key, events in self._selector.select(self._wait_s()):
                    if key.data is self._listener:
                        self._listener.serve()
                    elif key.fileobj is self._wake_out:
                        with contextlib.suppress(BlockingIOError):
                            self._wake_out.recv(4096)
                    elif events & selectors.EVENT_READ:
                        self._read(key.data)
                while self._tasks:
                    self._tasks.popleft()()
                self._write_all()
                self._listener.drop_slow()
                self._drop_slow_handshakes()
                self._keep_alive()
        except Exception as error:
            self._on_failure(error)
        finally:
            self._selector.close()
            self._close_sockets()

    def _wait_s(self) -> float:
        """How long to wait for events: until the next heartbeat at most."""
        return min(self._listener.wait_s(), max(0.01, self._next_heartbeat - time.monotonic()))

    def _close_sockets(self) -> None:
        for connection in self._own_connections():
            connection.close()
        self._listener.close()
        self._wake_in.close()
        self._wake_out.close()

    def _is_finished(self) -> bool:
        if self._stop_at is None:
            return False
        is_done = self._outboxes.is_empty() and self._may_stop()
        return is_done or time.monotonic() >= self._stop_at

    def _own_connections(self) -> list[PeerConnection]:
        """All but those of strangers, so that these cost nothing when the others are served."""
        return [*self._outboxes.connections(), *self._opening]

    def _resolve(self, peer: int, pause_s: float) -> None:
        """Find a peer's address and connect; in a thread of its own, as it may have to wait for the peer."""
        deadline = self._connect_until[peer]
        time.sleep(pause_s)
        try:
            while (address := self._directory.lookup(peer)) is None:
                if time.monotonic() >= deadline or self._stop_at is not None:
                    raise TimeoutError(f"it did not publish an address within {self._timeout_s:g} s")
                time.sleep(0.01)
            host, port, memory_domain = address.split(" ")
            if memory_domain == self.memory_domain:
                self.near.add(peer)
            left_s = max(1.0, deadline - time.monotonic())
            sock = socket.create_connection((host, int(port)), timeout=left_s)
        except Exception as error:
            why = f"cannot connect to it: {error}"
            self.run(lambda: self._give_up(peer, why))
            return
        self.run(lambda: self._connected(peer, sock))

    def _connected(self, peer: int, sock: socket.socket) -> None:
        connection = self._adopt(sock, Initiator(self._secret, rank=self._rank, peer=peer))
        self._selector.register(sock, selectors.EVENT_READ, connection)
        self._opening[connection] = time.monotonic()

    def _connect_again(self, peer: int, why: str) -> None:
        """The peer had too many strangers, or a network dropped the connection."""
        pause_s = random.uniform(*_RETRY_S)  # ranks that were dropped together must not come back together
        if time.monotonic() + pause_s > self._connect_until[peer] or self._stop_at is not None:
            self._give_up(peer, f"cannot connect to it: {why}")
        else:
            threading.Thread(target=self._resolve, args=(peer, pause_s), daemon=True).start()

    def _give_up(self, peer: int, why: str) -> None:
        self._outboxes.drop_unconnected(peer)
        if self._has_departed(peer):  # a peer that has left no longer listens
            self._on_peer_left(peer)
        else:
            self._on_peer_lost(peer, why)

    def _has_departed(self, peer: int) -> bool:
        """Whether `peer` has said goodbye, on whichever of its connections."""
        incoming = self._outboxes.incoming(peer)
        if peer not in self.departed and incoming is not None:
            self._read(incoming)
        return peer in self.departed

    def _adopt_stranger(self, sock: socket.socket, source: str) -> PeerConnection:
        return self._adopt(sock, Acceptor(self._secret, rank=self._rank, size=self._size), source=source)

    def _adopt(self, sock: socket.socket, guard: Initiator | Acceptor, source: str = "") -> PeerConnection:
        """Begin the handshake on a new socket."""
        return PeerConnection(sock, guard, max_payload_bytes=self._max_payload_bytes, source=source)

    def _meet(self, connection: PeerConnection, events: int) -> None:
        """A stranger can be read, or takes more of its answer."""
        if events & selectors.EVENT_READ:
            self._read(connection)
        if connection in self._listener.strangers:
            try:
                connection.transmit()  # no other thread knows it
            except OSError as error:
                self._listener.drop(connection, str(error))
                return
            self._listener.watch(connection, _events(connection))

    def _introduce(self, connection: PeerConnection) -> None:
        """The handshake is over: a stranger becomes a peer."""
        if connection in self._listener.strangers:
            self._listener.release(connection)
            self._selector.register(connection.sock, selectors.EVENT_READ, connection)
        elif self._opening.pop(connection, None) is None:
            return
        self._outboxes.attach(connection)

    def _read(self, connection: PeerConnection) -> None:
        was_ready = connection.is_ready
        try:
            for frame in connection.receive():
                if connection.returns:
                    self._return_blocks(connection)
                if frame.kind == FrameKind.GOODBYE:
                    self.departed.add(connection.peer)
                else:
                    self._introduce(connection)
                    self._on_frame(connection.peer, frame)
            if connection.is_ready and not was_ready:
                self._introduce(connection)
        except ProtocolError as error:
            self._opening.pop(connection, None)  # it would fail again
            self._disconnect(connection, str(error))
            if connection.is_outgoing and not was_ready:
                self._give_up(connection.peer, str(error))
        except OSError as error:
            self._disconnect(connection, str(error))

    def _return_blocks(self, connection: PeerConnection) -> None:
        """Tell the peer that its blocks have been read. A peer whose blocks can be read is near."""
        for descriptor in connection.returns:
            self._outboxes.add_to(connection, signal(FrameKind.RETURNED, descriptor))
        connection.returns.clear()
        self.near.add(connection.peer)

    def _write_all(self) -> None:
        for connection in self._own_connections():
            try:
                self._outboxes.transmit(connection)
            except OSError as error:
                self._read(connection)  # a goodbye may have come before
                self._disconnect(connection, str(error))
                continue
            wants = connection.wants_to_write()
            if wants != connection.is_watched_for_writing:
                connection.is_watched_for_writing = wants
                self._selector.modify(connection.sock, _events(connection), connection)

    def _keep_alive(self) -> None:
        """Let peers hear from this rank, and give up those from which nothing has come for too long."""
        now = time.monotonic()
        if now < self._next_heartbeat:
            return
        self._next_heartbeat = now + min(_HEARTBEAT_S, self._timeout_s / 8)
        for connection in self._outboxes.connections():
            if now - connection.heard_at > self._timeout_s / 2:  # before calls to it run out of time
                silent_s = now - connection.heard_at
                self._disconnect(
                    connection,
                    f"nothing has come from it for {silent_s:.0f} s: it is stopped, or cut off",
                )
            elif connection.outbox_bytes == 0 and self._stop_at is None:
                self._outboxes.add_to(connection, signal(FrameKind.HEARTBEAT, self._progress()))
        self._on_tick()

    def _drop_slow_handshakes(self) -> None:
        limit = time.monotonic() - HANDSHAKE_S
        slow = [c for c, since in self._opening.items() if since < limit]
        for connection in slow:
            self._disconnect(connection, f"no handshake within {HANDSHAKE_S:g} s")

    def _disconnect(self, connection: PeerConnection, why: str) -> None:
        if connection in self._listener.strangers:
            self._listener.drop(connection, why)
            return
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(connection.sock)
        connection.close()
        if connection in self._opening:
            self._opening.pop(connection, None)
            self._connect_again(connection.peer, why)
            return
        if not self._outboxes.detach(connection):
            return
        if not self._has_departed(connection.peer):
            self._on_peer_lost(connection.peer, why)
        elif connection.is_outgoing or not self._outboxes.has_outgoing(connection.peer):
            # While the outgoing connection lives, answers of the peer may still arrive on it.
            self._on_peer_left(connection.peer)


def _events(connection: PeerConnection) -> int:
    """What to wait for."""
    return selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.wants_to_write() else 0)
