"""A listener with a thread for each connection, for servers that speak to few processes at a time."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable

from paceline.comm.security.authentication import Acceptor, authenticate
from paceline.comm.security.strangers import HANDSHAKE_S, Strangers
from paceline.errors import ProtocolError

_ACCEPT_S = 1e-4
"""About what it takes to accept a connection and to start its thread."""


class ThreadedListener:
    """Accepts connections until `close`, and serves those that prove the key. Strangers are limited.

    Args:
        sock: The listening socket.
        who: Who listens, for the log.
        guard: Makes the acceptor's side of a handshake.
        serve: Called in a thread of its own with an authenticated socket and its guard; the socket is closed
            afterwards.
        num_expected: Processes of the job that may connect at the same time.
    """

    def __init__(
        self,
        sock: socket.socket,
        who: str,
        *,
        guard: Callable[[], Acceptor],
        serve: Callable[[socket.socket, Acceptor], None],
        num_expected: int = 0,
    ) -> None:
        self._sock, self._guard, self._serve = sock, guard, serve
        self._lock = threading.Lock()
        self._strangers: Strangers[socket.socket] = Strangers(who, num_expected=num_expected)
        self.port = int(sock.getsockname()[1])
        self._thread = threading.Thread(target=self._accept, name=f"paceline-{who}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening; connections that are being served go on."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        self._thread.join(5)

    def _accept(self) -> None:
        while True:
            try:
                sock, source = self._sock.accept()
            except OSError:
                return
            with self._lock:
                surplus = self._strangers.admit(sock)
                self._strangers.charge(_ACCEPT_S)
                pause_s = self._strangers.pause_s()
            if surplus is not None:
                with contextlib.suppress(OSError):
                    surplus.shutdown(socket.SHUT_RDWR)  # its thread ends
            threading.Thread(target=self._meet, args=(sock, str(source[0])), daemon=True).start()
            time.sleep(pause_s)

    def _meet(self, sock: socket.socket, source: str) -> None:
        with sock:
            guard = self._guard()
            try:
                authenticate(sock, guard, timeout_s=HANDSHAKE_S)
            except (OSError, ProtocolError) as error:
                with self._lock:
                    self._strangers.report(source, str(error))
                return
            finally:
                with self._lock:
                    self._strangers.discard(sock)
                    self._strangers.charge(time.thread_time())
            self._serve(sock, guard)
