"""What one rank has still to send, by peer. This file owns the lock of the mailbox.

Any thread may fill an outbox; the service thread alone opens, drains and ends connections. All that both
sides touch is inside `Outboxes`, whose methods take the lock themselves: its users hold no lock and need
none.
"""

from __future__ import annotations

import threading
import time
from collections import deque

from paceline.comm.messages import framing
from paceline.comm.messages.connection import PeerConnection
from paceline.comm.messages.framing import Buffers
from paceline.comm.messages.shared_blocks import Lender
from paceline.errors import PeerLost, Timeout


class Outboxes:
    """Frames to every peer, the connections that carry them, and which peers are lost.

    There are two connections between two ranks that call each other. Requests leave on the one that this rank
    opened (outgoing), answers on the one that the peer opened (incoming).
    """

    def __init__(self, rank: int, lender: Lender, *, limit_bytes: int, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        """How long `add_request` waits for room."""
        self._rank, self._lender, self._limit_bytes = rank, lender, limit_bytes
        self._changed = threading.Condition()
        """The lock of all that follows; notified when an outbox has more room and when a peer is lost."""
        self._outgoing: dict[int, PeerConnection] = {}
        self._incoming: dict[int, PeerConnection] = {}
        self._unconnected: dict[int, deque[Buffers]] = {}
        """Requests to peers to which a connection is being opened."""
        self._unconnected_bytes: dict[int, int] = {}
        self._lost: dict[int, str] = {}
        self._is_closed = False

    # Any thread

    def add_request(self, peer: int, frame: Buffers, block: int | None, *, may_wait: bool) -> bool:
        """Queue a frame to `peer`, once its outbox has room; returns whether a connection must be opened.

        Args:
            peer: Rank that receives it.
            frame: Its bytes.
            block: Descriptor of the block of shared memory that holds its tensors, if any. What is lent
                counts as queued, except for this block.
            may_wait: False on the service thread, which would stop both sides for ever if it waited.

        Raises:
            PeerLost: The peer is lost.
            Timeout: The outbox stayed full for `timeout_s`.
        """
        with self._changed:
            num_bytes = framing.length(frame)
            self._wait_for_room(peer, num_bytes, block, may_wait)
            connection = self._outgoing.get(peer)
            if connection is not None:
                connection.append(frame)
                return False
            is_first = peer not in self._unconnected
            self._unconnected.setdefault(peer, deque()).append(frame)
            self._unconnected_bytes[peer] = self._unconnected_bytes.get(peer, 0) + num_bytes
            return is_first

    def add_answer(self, peer: int, frame: Buffers) -> None:
        """Queue a frame on the connection that `peer` opened; dropped if that has ended."""
        with self._changed:
            connection = self._incoming.get(peer)
            if connection is not None:
                connection.append(frame)

    def add_goodbyes(self) -> None:
        """Tell all peers that this rank leaves."""
        with self._changed:
            for connection in [*self._outgoing.values(), *self._incoming.values()]:
                connection.append(framing.signal(framing.FrameKind.GOODBYE))

    def notify(self) -> None:
        """Let threads that wait for room look again: a peer has returned a block."""
        with self._changed:
            self._changed.notify_all()

    def mark_lost(self, peer: int, why: str) -> bool:
        """Refuse frames to `peer` from now on; returns whether that is new, and of interest."""
        with self._changed:
            if peer in self._lost or self._is_closed:
                return False
            self._lost[peer] = why
            self._changed.notify_all()
            return True

    def lost(self) -> list[int]:
        """The peers that are lost, in the order of ranks."""
        with self._changed:
            return sorted(self._lost)

    def why_lost(self, peer: int) -> str:
        """The reason why `peer` is lost; "" if it is not."""
        return self._lost.get(peer, "")

    def close(self) -> bool:
        """Mark as closed; returns whether it was open."""
        with self._changed:
            was_open = not self._is_closed
            self._is_closed = True
            return was_open

    @property
    def is_closed(self) -> bool:
        """Whether this rank is leaving."""
        return self._is_closed

    # The service thread

    def attach(self, connection: PeerConnection) -> None:
        """Use a new connection to its peer; an outgoing one gets the frames that waited for it."""
        with self._changed:
            if not connection.is_outgoing:
                self._incoming[connection.peer] = connection
                return
            self._outgoing[connection.peer] = connection
            for frame in self._unconnected.pop(connection.peer, ()):
                connection.append(frame)
            self._unconnected_bytes.pop(connection.peer, None)

    def detach(self, connection: PeerConnection) -> bool:
        """Forget a connection that has ended; returns whether it was in use."""
        with self._changed:
            connection.outbox_bytes = 0
            connections = self._outgoing if connection.is_outgoing else self._incoming
            was_in_use = connections.get(connection.peer) is connection
            if was_in_use:
                del connections[connection.peer]
            return was_in_use

    def drop_unconnected(self, peer: int) -> None:
        """Forget the frames to a peer that cannot be reached."""
        with self._changed:
            self._unconnected.pop(peer, None)
            self._unconnected_bytes.pop(peer, None)

    def add_to(self, connection: PeerConnection, frame: Buffers) -> None:
        """Queue a frame on this very connection."""
        with self._changed:
            connection.append(frame)

    def transmit(self, connection: PeerConnection) -> None:
        """Send what the socket of `connection` takes. Raises OSError."""
        with self._changed:
            if connection.transmit():
                self._changed.notify_all()

    def incoming(self, peer: int) -> PeerConnection | None:
        """The connection that `peer` has opened, if there is one."""
        return self._incoming.get(peer)

    def has_outgoing(self, peer: int) -> bool:
        """Whether this rank has a connection of its own to `peer`."""
        return peer in self._outgoing

    def connections(self) -> list[PeerConnection]:
        """All connections in use. Takes no lock: only the calling thread adds and removes them."""
        return [*self._outgoing.values(), *self._incoming.values()]

    def is_empty(self) -> bool:
        """Whether there is nothing left to send."""
        with self._changed:
            return not self._unconnected and not any(c.outbox_bytes for c in self.connections())

    # With the lock

    def _wait_for_room(self, peer: int, num_bytes: int, block: int | None, may_wait: bool) -> None:
        deadline = time.monotonic() + self.timeout_s
        while True:
            if peer in self._lost:
                raise PeerLost(f"rank {self._rank}: rank {peer} is lost: {self._lost[peer]}")
            queued = self._queued_bytes(peer) + self._lender.lent_bytes(peer, but=block)
            if not may_wait or queued == 0 or queued + num_bytes <= self._limit_bytes:
                return
            if not self._changed.wait(max(0.0, deadline - time.monotonic())):
                raise Timeout(
                    f"rank {self._rank}: outbox to rank {peer} stayed full ({queued} bytes) for "
                    f"{self.timeout_s:g} s. Is that rank alive, and do its handlers return?"
                )

    def _queued_bytes(self, peer: int) -> int:
        connection = self._outgoing.get(peer)
        if connection is not None:
            return connection.outbox_bytes
        return self._unconnected_bytes.get(peer, 0)
