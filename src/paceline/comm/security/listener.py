"""A listening socket whose strangers cost a bounded share of the thread that serves it."""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from paceline.comm.security.strangers import HANDSHAKE_S, Strangers

_TICK_S = 0.5

C = TypeVar("C", bound=Hashable)


class Listener(Generic[C]):
    """Accepts connections for a thread with a selector. All methods belong to that thread.

    Args:
        sock: The listening socket.
        selector: The thread's selector; the socket is registered there with data None.
        who: Who listens, for the log: "rank 3, messages".
        adopt: Makes and registers a connection of a new socket and its source address.
        drop: Closes a connection for a reason, and calls `strangers.discard`.
        num_expected: Processes of the job that may connect at the same time.
    """

    def __init__(
        self,
        sock: socket.socket,
        selector: selectors.BaseSelector,
        who: str,
        *,
        adopt: Callable[[socket.socket, str], C],
        drop: Callable[[C, str], None],
        num_expected: int = 0,
    ) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.strangers: Strangers[C] = Strangers(who, num_expected=num_expected)
        self._selector, self._adopt, self._drop = selector, adopt, drop
        self._is_accepting = True
        selector.register(sock, selectors.EVENT_READ, None)

    def wait_s(self) -> float:
        """How long to wait for events. New connections wait while strangers have used up their share."""
        pause_s = self.strangers.pause_s()
        if (pause_s == 0.0) != self._is_accepting:
            self._is_accepting = pause_s == 0.0
            if self._is_accepting:
                self._selector.register(self.sock, selectors.EVENT_READ, None)
            else:
                self._selector.unregister(self.sock)
        return pause_s or _TICK_S

    def accept(self) -> None:
        """Take the next connection in. If there are too many strangers, the oldest goes."""
        try:
            sock, source = self.sock.accept()
        except BlockingIOError:
            return
        except OSError as error:  # no free descriptor
            oldest = next(iter(self.strangers), None)
            if oldest is not None:
                self._drop(oldest, f"this process cannot accept more connections: {error}")
            else:
                time.sleep(_TICK_S / 10)
            return
        surplus = self.strangers.admit(self._adopt(sock, str(source[0]) if source else "this host"))
        if surplus is not None:
            self._drop(surplus, "too many connections without a handshake")

    def drop_slow(self) -> None:
        """End handshakes that take too long."""
        for connection in self.strangers.overdue():
            self._drop(connection, f"no handshake within {HANDSHAKE_S:g} s")
