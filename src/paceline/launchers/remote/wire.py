"""One authenticated socket between a launcher and a keeper: frames of a small JSON header and raw bytes.

    frame   header_bytes u32 · blob_bytes u64 · header (UTF-8 JSON object) · blob

Mutual challenge-response (`comm.authentication`) comes first. It authenticates; it does not encrypt.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
from typing import Any

from paceline.comm.messages.authentication import Acceptor, Initiator
from paceline.errors import CommError, ProtocolError

_HEAD = struct.Struct("<IQ")
_MAX_HEADER_BYTES = 1 << 24
_MAX_BLOB_BYTES = 1 << 36
_HANDSHAKE_S = 20.0
_LAUNCHER = 0
MAX_MEMBERS = 1 << 20


class Wire:
    """Both ends. `send` may be called from any thread, `receive` from one."""

    def __init__(self, sock: socket.socket, guard: Initiator | Acceptor) -> None:
        self._sock = sock
        self._lock = threading.Lock()
        sock.settimeout(_HANDSHAKE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if opening := guard.start():
            sock.sendall(opening)
        while not guard.is_done:
            if answer := guard.feed(bytes(self._read(guard.needs))):
                sock.sendall(answer)
        sock.settimeout(None)

    def send(self, header: dict[str, Any], blob: bytes = b"") -> None:
        """Send one frame. Raises OSError when the other end is gone."""
        text = json.dumps(header).encode()
        with self._lock:
            self._sock.sendall(_HEAD.pack(len(text), len(blob)) + text)
            self._sock.sendall(blob)

    def receive(self) -> tuple[dict[str, Any], bytes]:
        """Wait for the next frame. Raises OSError when the other end is gone, ProtocolError for nonsense."""
        header_bytes, blob_bytes = _HEAD.unpack(self._read(_HEAD.size))
        if header_bytes > _MAX_HEADER_BYTES or blob_bytes > _MAX_BLOB_BYTES:
            raise ProtocolError(f"a frame announces {header_bytes} and {blob_bytes} bytes")
        header = json.loads(self._read(header_bytes))
        return header, bytes(self._read(blob_bytes))

    def close(self) -> None:
        """Close the socket; a waiting `receive` ends."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _read(self, count: int) -> bytearray:
        data = bytearray(count)
        view = memoryview(data)
        while view:
            got = self._sock.recv_into(view)
            if got == 0:
                raise ConnectionResetError("the connection was closed")
            view = view[got:]
        return data


def connect(host: str, port: int, secret: bytes, index: int) -> Wire:
    """The keeper's end. Raises CommError when the launcher cannot be reached."""
    try:
        sock = socket.create_connection((host, port), timeout=_HANDSHAKE_S)
        return Wire(sock, Initiator(secret, rank=index, peer=_LAUNCHER))
    except OSError as error:
        raise CommError(
            f"host {socket.gethostname()}: the launcher at {host}:{port} cannot be reached: {error}; is its"
            " address one that this host can route to?"
        ) from None


def accept(sock: socket.socket, secret: bytes) -> tuple[Wire, int]:
    """The launcher's end of a new connection, and the index the keeper has. Raises OSError, ProtocolError."""
    guard = Acceptor(secret, rank=_LAUNCHER, size=MAX_MEMBERS)
    wire = Wire(sock, guard)
    return wire, guard.peer
