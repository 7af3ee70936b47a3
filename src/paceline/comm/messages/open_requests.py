"""Requests that this rank has not answered yet, and whether the ranks that it waits for make progress.

A handler may answer late: when another rank has come, or when all have finished. The caller's deadline must
not run out while all ranks make progress, however slow; nor may the caller wait for ever for a rank that is
stuck. So the rank that owes the answers says now and then that they are pending, as long as every rank shows
progress.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from paceline.types import Rank


class OpenRequest(NamedTuple):
    """A request of another rank, or of this one, without an answer."""

    source: Rank
    id: int
    channel: str


class OpenRequests:
    """All open requests of one mailbox, and the progress of every rank. Any thread may use it.

    Args:
        size: Number of ranks.
        deadline_s: After how many seconds without progress a rank is stuck.
        clock: Monotonic seconds.
    """

    def __init__(self, size: int, deadline_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._deadline_s, self._clock = deadline_s, clock
        self._lock = threading.Lock()
        self._since: dict[OpenRequest, float] = {}
        self._counts = [0] * size
        self._moved_at = [clock()] * size

    def add(self, request: OpenRequest) -> None:
        """A request has come."""
        with self._lock:
            self._since[request] = self._clock()
            self._moved_at[request.source] = self._clock()

    def discard(self, request: OpenRequest) -> None:
        """It has been answered."""
        with self._lock:
            self._since.pop(request, None)

    def note_progress(self, rank: Rank, count: int | None = None) -> None:
        """`rank` has sent something, or says that its progress is `count`, which is news if it changed."""
        with self._lock:
            if count is None or count != self._counts[rank]:
                self._moved_at[rank] = self._clock()
            if count is not None:
                self._counts[rank] = count

    def open(self) -> list[OpenRequest]:
        """All of them."""
        with self._lock:
            return list(self._since)

    def late(self) -> list[OpenRequest]:
        """Those that have waited for a quarter of the deadline."""
        limit = self._clock() - self._deadline_s / 4
        with self._lock:
            return [request for request, since in self._since.items() if since < limit]

    def stuck(self) -> list[Rank]:
        """The ranks that show no progress, and do not wait for an answer of this rank themselves."""
        limit = self._clock() - self._deadline_s
        with self._lock:
            waiting = {request.source for request in self._since}
            return [r for r, at in enumerate(self._moved_at) if at < limit and r not in waiting]
