"""A listening socket whose strangers cost a bounded share of the thread that serves it."""

from __future__ import annotations

import contextlib
import selectors
import socket
import time
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar

from paceline.comm.security.strangers import HANDSHAKE_S, Strangers

_TICK_S = 0.5


class Connection(Protocol):
    """What a listener knows of a connection."""

    sock: socket.socket
    source: str


C = TypeVar("C", bound=Connection)


class Listener(Generic[C]):
    """Accepts connections and serves them until their handshake is over, for a thread with a selector.

    The listening socket and the strangers have a selector of their own, which the thread's selector watches
    while strangers have not used up their share of the thread: a flood costs the peers of the thread little
    more than that. All methods belong to that thread.

    Args:
        sock: The listening socket.
        selector: The thread's selector; the strangers' selector is registered there with this object as data.
        who: Who listens, for the log: "rank 3, messages".
        adopt: Makes a connection of a new socket and its source address.
        read: Moves a connection's handshake on, when it can be read or written; calls `release` or `drop`.
        num_expected: Processes of the job that may connect at the same time.
    """

    def __init__(
        self,
        sock: socket.socket,
        selector: selectors.BaseSelector,
        who: str,
        *,
        adopt: Callable[[socket.socket, str], C],
        read: Callable[[C, int], None],
        num_expected: int = 0,
    ) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.strangers: Strangers[C] = Strangers(who, num_expected=num_expected)
        self._selector, self._adopt, self._read = selector, adopt, read
        self._own = selectors.DefaultSelector()
        self._own.register(sock, selectors.EVENT_READ, None)
        self._is_watched = False
        self.wait_s()

    def wait_s(self) -> float:
        """How long to wait for events. Strangers wait while they have used up their share."""
        pause_s = self.strangers.pause_s()
        if (pause_s == 0.0) != self._is_watched:
            self._is_watched = pause_s == 0.0
            if self._is_watched:
                self._selector.register(self._own, selectors.EVENT_READ, self)
            else:
                self._selector.unregister(self._own)
        return pause_s or _TICK_S

    def serve(self) -> None:
        """New connections, and what strangers sent: as much as their share allows."""
        for key, events in self._own.select(0):
            with self._charged():
                if key.data is None:
                    self._accept()
                elif key.data in self.strangers:  # it may have gone for a newer one just now
                    self._read(key.data, events)
            if self.strangers.pause_s():
                return

    def watch(self, connection: C, events: int) -> None:
        """Wait for other events of a stranger."""
        self._own.modify(connection.sock, events, connection)

    def release(self, connection: C) -> None:
        """It is no stranger any more: the thread's own selector is to watch it."""
        if connection in self.strangers:
            self.strangers.discard(connection)
            self._own.unregister(connection.sock)

    def drop(self, connection: C, why: str) -> None:
        """Close a stranger's connection, and say so."""
        self.release(connection)
        connection.sock.close()
        self.strangers.report(connection.source, why)

    def drop_slow(self) -> None:
        """End handshakes that take too long."""
        for connection in self.strangers.overdue():
            self.drop(connection, f"no handshake within {HANDSHAKE_S:g} s")

    def close(self) -> None:
        """Close the listening socket and all strangers' connections."""
        for connection in self.strangers:
            connection.sock.close()
        self._own.close()
        self.sock.close()

    def _accept(self) -> None:
        """Take the next connection in. If there are too many strangers, the oldest goes."""
        try:
            sock, source = self.sock.accept()
        except BlockingIOError:
            return
        except OSError as error:  # no free descriptor
            oldest = next(iter(self.strangers), None)
            if oldest is not None:
                self.drop(oldest, f"this process cannot accept more connections: {error}")
            else:
                self.strangers.defer(_TICK_S)  # who waits to be accepted must not make this thread spin
            return
        connection = self._adopt(sock, str(source[0]) if source else "this host")
        self._own.register(sock, selectors.EVENT_READ, connection)
        surplus = self.strangers.admit(connection)
        if surplus is not None:
            self.drop(surplus, "too many connections without a handshake")

    @contextlib.contextmanager
    def _charged(self) -> Iterator[None]:
        """What the thread spends inside is taken from the strangers' share."""
        began = time.thread_time()
        try:
            yield
        finally:
            self.strangers.charge(time.thread_time() - began)
