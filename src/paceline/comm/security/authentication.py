"""Mutual challenge-response with the job's secret, before any other byte is parsed.

    initiator → acceptor   HELLO      magic · rank a · rank b · nonce_a                   (48 bytes)
    acceptor  → initiator  CHALLENGE  nonce_b · MAC("acceptor", a, b, nonce_a, nonce_b)   (64 bytes)
    initiator → acceptor   PROOF      MAC("initiator", a, b, nonce_a, nonce_b)            (32 bytes)

MAC is HMAC-SHA256. It covers the role and both ranks, so an answer cannot be reflected, nor used between
other ranks; nonces are fresh on both sides, so it cannot be replayed. All messages have a fixed size: nothing
that an unknown peer sends decides how much is read. It authenticates; it does not encrypt (use a VPN or
WireGuard between sites).

The two classes are state machines without input or output: `feed` takes received bytes and returns what to
send. `authenticate` runs one on a blocking socket.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import socket
import struct
import time

from paceline.comm.security.receive import receive_exactly
from paceline.errors import ProtocolError

MAGIC = b"PACELN\x01\x00"
_HELLO = struct.Struct("<8sII32s")
_NONCE_BYTES = 32
_MAC_BYTES = 32


def _mac(secret: bytes, role: bytes, initiator: int, acceptor: int, nonces: bytes) -> bytes:
    text = b"paceline messages 1\0" + role + struct.pack("<II", initiator, acceptor) + nonces
    return hmac.new(secret, text, hashlib.sha256).digest()


class Initiator:
    """The side that connects."""

    needs = _NONCE_BYTES + _MAC_BYTES

    def __init__(self, secret: bytes, *, rank: int, peer: int) -> None:
        self._secret, self._rank, self.peer = secret, rank, peer
        self._nonce = os.urandom(_NONCE_BYTES)
        self.is_done = False

    def start(self) -> bytes:
        """Return the first bytes to send."""
        return _HELLO.pack(MAGIC, self._rank, self.peer, self._nonce)

    def feed(self, data: bytes) -> bytes:
        """Check the acceptor's `needs` bytes; return our proof. Raises ProtocolError."""
        nonces = self._nonce + data[:_NONCE_BYTES]
        expected = _mac(self._secret, b"acceptor", self._rank, self.peer, nonces)
        if not hmac.compare_digest(expected, data[_NONCE_BYTES:]):
            raise ProtocolError(
                f"rank {self._rank}: the process that answered as rank {self.peer} does not know this job's"
                " secret; do two jobs share an address?"
            )
        self.needs, self.is_done = 0, True
        return _mac(self._secret, b"initiator", self._rank, self.peer, nonces)


class Acceptor:
    """The side that listens. `peer` can be trusted once `is_done`."""

    def __init__(self, secret: bytes, *, rank: int, size: int) -> None:
        self._secret, self._rank, self._size = secret, rank, size
        self._expected: bytes = b""
        self.needs = _HELLO.size
        self.peer = -1
        self.is_done = False

    def start(self) -> bytes:
        """Nothing: the initiator speaks first."""
        return b""

    def feed(self, data: bytes) -> bytes:
        """Take the next `needs` bytes; return what to send. Raises ProtocolError."""
        if not self._expected:
            magic, peer, target, nonce = _HELLO.unpack(data)
            if magic != MAGIC or target != self._rank or not 0 <= peer < self._size:
                raise ProtocolError("a connection that does not start with a valid HELLO to this rank")
            nonces = nonce + os.urandom(_NONCE_BYTES)
            self._expected = _mac(self._secret, b"initiator", peer, target, nonces)
            self.peer, self.needs = peer, _MAC_BYTES
            answer: bytes = nonces[_NONCE_BYTES:] + _mac(self._secret, b"acceptor", peer, target, nonces)
            return answer
        if not hmac.compare_digest(self._expected, data):
            raise ProtocolError(
                f"the process that connected as rank {self.peer} does not know this job's secret"
            )
        self.needs, self.is_done = 0, True
        return b""


def authenticate(sock: socket.socket, guard: Initiator | Acceptor, *, timeout_s: float) -> None:
    """Perform one side of the handshake on a blocking socket, within `timeout_s` seconds in all.

    Raises OSError when the other side hangs up or is too slow, ProtocolError when it does not know the
    secret. The socket has no timeout afterwards.
    """
    deadline = time.monotonic() + timeout_s
    if opening := guard.start():
        sock.sendall(opening)
    while not guard.is_done:
        if answer := guard.feed(bytes(receive_exactly(sock, guard.needs, deadline=deadline))):
            sock.sendall(answer)
    sock.settimeout(None)
