"""The calls of one rank that wait for their answer."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

from paceline.comm.messages.reply import Deferred
from paceline.errors import CommError


class PendingCalls:
    """Replies by the id of their request. Any thread may use it: it has a lock of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ids = itertools.count(1)
        self._replies: dict[int, tuple[int, Deferred]] = {}

    def add(self, peer: int, reply: Deferred) -> int:
        """Keep `reply` until `peer` answers; returns the id that the request must carry."""
        with self._lock:
            id = next(self._ids)
            self._replies[id] = (peer, reply)
        return id

    def withdraw(self, id: int) -> None:
        """The request was not sent: forget it."""
        with self._lock:
            self._replies.pop(id, None)

    def take(self, id: int, peer: int) -> Deferred | None:
        """Return the reply to request `id`, once; None unless that request went to `peer`."""
        with self._lock:
            asked, reply = self._replies.get(id, (-1, None))
            if reply is None or asked != peer:
                return None
            del self._replies[id]
        return reply

    def extend(self, id: int, peer: int) -> None:
        """The answer to request `id`, which went to `peer`, will come late."""
        with self._lock:
            asked, reply = self._replies.get(id, (-1, None))
        if reply is not None and asked == peer:
            reply.extend()

    def fail(self, error: Callable[[], CommError], peer: int | None = None) -> None:
        """Fail all calls to `peer` (None: to any peer), each with an error of its own."""
        with self._lock:
            failed = [id for id, (asked, _) in self._replies.items() if peer is None or asked == peer]
            replies = [self._replies.pop(id)[1] for id in failed]
        for reply in replies:
            reply.fail(error())
