"""Whole messages of known size from a blocking socket."""

from __future__ import annotations

import socket
import time


def receive_exactly(sock: socket.socket, num_bytes: int, *, deadline: float | None = None) -> bytearray:
    """The next `num_bytes` bytes.

    Args:
        sock: A blocking socket.
        num_bytes: How many are to come.
        deadline: When (monotonic seconds) they must be here; None: the socket's own timeout holds for each
            piece.

    Raises:
        ConnectionResetError: The other side closed the connection before.
        OSError: The connection broke, or the time was up.
    """
    data = bytearray(num_bytes)
    view = memoryview(data)
    while view:
        if deadline is not None:
            sock.settimeout(max(0.001, deadline - time.monotonic()))
        got = sock.recv_into(view)
        if got == 0:
            raise ConnectionResetError("the other side closed the connection")
        view = view[got:]
    return data
