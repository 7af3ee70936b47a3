"""Connections that have not proved the key yet: few, short-lived, and cheap for the process they reach.

A listener admits each new connection here. When there are too many, the oldest goes, never the newest: honest
processes finish their handshake within milliseconds, and those that were dropped try again. The time that a
thread spends on them is charged, and they wait once they have had their share of it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

MOST = 64
"""How many there may be at a time, besides the processes of the job."""
HANDSHAKE_S = 10.0
_SHARE = 0.05
"""Of the thread's time: what strangers may cost for long."""
_BURST_S = 0.25
"""What they may cost at once, as when all ranks of a job connect."""
_LOG_S = 60.0
_MOST_SOURCES = 64

C = TypeVar("C")


class Strangers(Generic[C]):
    """The unauthenticated connections of one listener. All methods belong to the listener's thread.

    Args:
        who: Who listens, for the log: "rank 3, messages".
        num_expected: Processes of the job that may connect at the same time.
        clock: Monotonic seconds.
    """

    def __init__(
        self, who: str, *, num_expected: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._who, self._most = who, MOST + num_expected
        self._clock = clock
        self._began: dict[C, float] = {}  # in the order of arrival
        self._left_s, self._filled_at = _BURST_S, clock()
        self._reports: dict[str, tuple[float, int]] = {}  # source → when it was reported, refused since

    def __iter__(self) -> Iterator[C]:
        return iter(list(self._began))

    def __len__(self) -> int:
        return len(self._began)

    def __contains__(self, connection: C) -> bool:
        return connection in self._began

    def pause_s(self) -> float:
        """Seconds until strangers may be served again; 0 if they may be now."""
        now = self._clock()
        self._left_s = min(_BURST_S, self._left_s + (now - self._filled_at) * _SHARE)
        self._filled_at = now
        return max(0.0, -self._left_s / _SHARE)

    def charge(self, seconds: float) -> None:
        """So much of the thread's time was spent on strangers."""
        self._left_s -= seconds

    def defer(self, seconds: float) -> None:
        """Serve none for so long."""
        self._left_s = min(self._left_s, -seconds * _SHARE)

    def admit(self, connection: C) -> C | None:
        """Take a new connection in; returns the one to drop for it, if there are too many."""
        self._began[connection] = self._clock()
        return next(iter(self._began)) if len(self._began) > self._most else None

    def discard(self, connection: C) -> None:
        """The connection is authenticated or closed."""
        self._began.pop(connection, None)

    def overdue(self) -> list[C]:
        """Those whose handshake takes too long."""
        limit = self._clock() - HANDSHAKE_S
        return [c for c, began in self._began.items() if began < limit]

    def report(self, source: str, why: str) -> None:
        """Say on standard error that a stranger was refused: one line for each source and minute.

        Args:
            source: Where it came from.
            why: What was wrong.
        """
        now = self._clock()
        if source not in self._reports and len(self._reports) >= _MOST_SOURCES:
            source = "many addresses"
        reported_at, count = self._reports.get(source, (-_LOG_S, 0))
        if now - reported_at < _LOG_S:
            self._reports[source] = (reported_at, count + 1)
            return
        more = f" ({count} more since the last such line)" if count else ""
        self._reports[source] = (now, 0)
        print(f"paceline: {self._who}: refused a connection from {source}: {why}{more}", file=sys.stderr)
