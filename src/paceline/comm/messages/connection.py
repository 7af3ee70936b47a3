"""One authenticated socket of the mailbox: bytes in and out, without blocking and without threads.

`receive` belongs to the service thread. `append` and `transmit` are called by `Outboxes` alone, under its
lock.
"""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Iterator

from paceline.comm.messages import framing
from paceline.comm.messages.framing import Buffers, Frame, FrameHeader, FramePrefix
from paceline.comm.messages.shared_blocks import Borrower
from paceline.comm.security.authentication import Acceptor, Initiator
from paceline.errors import ProtocolError
from paceline.types import Message

_BUFFERS_PER_CALL = 64
_FRAMES_PER_TURN = 64


class PeerConnection:
    """A non-blocking socket that authenticates itself, then carries frames both ways."""

    def __init__(
        self, sock: socket.socket, guard: Initiator | Acceptor, *, max_payload_bytes: int, source: str
    ) -> None:
        sock.setblocking(False)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self.source = source
        """The address that it came from; "" if this rank opened it."""
        self.is_outgoing = isinstance(guard, Initiator)
        """Whether this rank opened it."""
        self.heard_at = time.monotonic()
        """When bytes came from it last."""
        self.is_watched_for_writing = False
        self.returns: list[int] = []
        """The peer's blocks that have been read and are to be returned to it."""
        self._guard = guard
        self._max_payload_bytes = max_payload_bytes
        self._handshake: deque[memoryview] = deque(memoryview(b) for b in [guard.start()] if b)
        self._outbox: deque[memoryview] = deque()
        self.outbox_bytes = 0
        self._prefix: FramePrefix | None = None
        self._header: FrameHeader | None = None
        self._borrower = Borrower()
        self._expect(guard.needs)

    @property
    def is_ready(self) -> bool:
        """Whether both sides have proved that they know the secret."""
        return self._guard.is_done

    @property
    def peer(self) -> int:
        """Rank at the other end; believed only when `is_ready`."""
        return self._guard.peer

    def append(self, frame: Buffers) -> None:
        """Queue a frame behind those that wait already."""
        self._outbox.extend(frame)
        self.outbox_bytes += framing.length(frame)

    def wants_to_write(self) -> bool:
        """Whether there are bytes that may be sent now."""
        return bool(self._handshake) or (self.is_ready and bool(self._outbox))

    def transmit(self) -> bool:
        """Send what the socket takes; returns whether the outbox has become shorter. Raises OSError."""
        before = self.outbox_bytes
        while self.wants_to_write():
            queue = self._handshake or self._outbox
            views = [queue[i] for i in range(min(len(queue), _BUFFERS_PER_CALL))]
            try:
                sent = self.sock.sendmsg(views)
            except BlockingIOError:
                break
            if queue is self._outbox:
                self.outbox_bytes -= sent
            while sent:
                if sent < len(queue[0]):
                    queue[0] = queue[0][sent:]
                    break
                sent -= len(queue.popleft())
        return self.outbox_bytes < before

    def receive(self) -> Iterator[Frame]:
        """Yield the frames that have arrived. Raises ProtocolError, or ConnectionError when the peer left."""
        frames = 0
        while frames < _FRAMES_PER_TURN:
            while self._targets and not len(self._targets[0]):
                self._targets.popleft()
            if self._targets:
                try:
                    count = self.sock.recv_into(self._targets[0])
                except BlockingIOError:
                    return
                self.heard_at = time.monotonic()
                if count == 0:
                    raise ConnectionResetError("the connection was closed")
                self._targets[0] = self._targets[0][count:]
                continue
            frame = self._advance()
            if frame is not None:
                frames += 1
                yield frame

    def close(self) -> None:
        """Close the socket; nothing is sent any more."""
        self.sock.close()

    def _expect(self, num_bytes: int) -> None:
        self._buffer = bytearray(num_bytes)
        self._targets = deque([memoryview(self._buffer)])

    def _advance(self) -> Frame | None:
        """All expected bytes are here: take the next step of the protocol."""
        if not self._guard.is_done:
            answer = self._guard.feed(bytes(self._buffer))
            if answer:
                self._handshake.append(memoryview(answer))
            self._expect(self._guard.needs or framing.PREFIX.size)
            return None
        if self._prefix is None:
            self._prefix = framing.parse_prefix(self._buffer, max_payload_bytes=self._max_payload_bytes)
            if self._prefix.header_bytes == 0:
                if self._prefix.payload_bytes:
                    raise ProtocolError("a payload without a header")
                return self._finish(self._prefix, FrameHeader("", {}, []))
            self._expect(self._prefix.header_bytes)
            return None
        if self._header is None:
            self._header = framing.parse_header(self._buffer, self._prefix.payload_bytes)
            targets = [framing.raw(t) for t in self._header.tensors if t.numel()]
            if self._header.block is not None:
                self.returns.append(self._borrower.read(self._header.block, targets))
            elif targets:
                self._targets = deque(targets)
                return None
        return self._finish(self._prefix, self._header)

    def _finish(self, prefix: FramePrefix, header: FrameHeader) -> Frame:
        self._prefix = self._header = None
        self._expect(framing.PREFIX.size)
        return Frame(prefix.kind, prefix.id, header.channel, Message(header.values, header.tensors))
