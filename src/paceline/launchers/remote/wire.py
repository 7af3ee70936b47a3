"""One authenticated socket between the driver and a supervisor: frames of a JSON header and raw bytes.

    frame   header_bytes u32 · blob_bytes u64 · header (UTF-8 JSON object) · blob

Mutual challenge-response (`comm.security.authentication`) comes first. Frames are not encrypted.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
from typing import Any

from paceline.comm.security.authentication import Acceptor, Initiator, authenticate
from paceline.comm.security.receive import receive_exactly
from paceline.errors import CommError, ProtocolError

_HEAD = struct.Struct("<IQ")
_MAX_HEADER_BYTES = 1 << 24
_MAX_BLOB_BYTES = 1 << 36
_HANDSHAKE_S = 20.0
_DRIVER = 0  # the driver's rank in the handshake
MAX_SUPERVISORS = 1 << 20


class Wire:
    """One end of the authenticated socket. `send` may be called from any thread, `receive` from one."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def send(self, header: dict[str, object], blob: bytes = b"") -> None:
        """Send one frame. Raises OSError when the other end is gone."""
        text = json.dumps(header).encode()
        with self._lock:
            self._sock.sendall(_HEAD.pack(len(text), len(blob)) + text)
            self._sock.sendall(blob)

    def receive(self) -> tuple[dict[str, Any], bytes]:
        """The next frame. Raises OSError if the other end is gone, ProtocolError for absurd sizes."""
        header_bytes, blob_bytes = _HEAD.unpack(receive_exactly(self._sock, _HEAD.size))
        if header_bytes > _MAX_HEADER_BYTES or blob_bytes > _MAX_BLOB_BYTES:
            raise ProtocolError(f"a frame announces {header_bytes} and {blob_bytes} bytes")
        header = json.loads(receive_exactly(self._sock, header_bytes))
        return header, bytes(receive_exactly(self._sock, blob_bytes))

    def close(self) -> None:
        """Close the socket; a waiting `receive` ends."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


def connect(host: str, port: int, secret: bytes, index: int) -> Wire:
    """The supervisor's end. Raises CommError when the driver cannot be reached."""
    try:
        sock = socket.create_connection((host, port), timeout=_HANDSHAKE_S)
        authenticate(sock, Initiator(secret, rank=index, peer=_DRIVER), timeout_s=_HANDSHAKE_S)
        return Wire(sock)
    except OSError as error:
        raise CommError(
            f"host {socket.gethostname()}: the launcher at {host}:{port} cannot be reached: {error}; can this"
            " host route to that address?"
        ) from None


def acceptor(secret: bytes) -> Acceptor:
    """The driver's side of a handshake; its `peer` is then the supervisor's index."""
    return Acceptor(secret, rank=_DRIVER, size=MAX_SUPERVISORS)
