"""The message service of a rank in virtual time: one message at a time, each as long as its work takes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from paceline.comm.simulated.clock import VirtualClock


class MessageService:
    """Runs the handlers of one rank, beside its worker. Messages that come meanwhile wait in their order.

    A handler's effects on its rank happen when it begins, which nobody can tell: all of them pass through
    here. What it sends leaves when the work done until then is over.
    """

    def __init__(self, clock: VirtualClock, rank: int) -> None:
        self._clock, self._rank = clock, rank
        self._free_s = 0.0
        self._queue: deque[Callable[[], None]] = deque()

    @property
    def reached_s(self) -> float:
        """The time when all work so far is over: now, if there was none."""
        return max(self._clock.now, self._free_s)

    def work(self, seconds: float) -> None:
        """Be busy for `seconds` more."""
        self._free_s = self.reached_s + seconds

    def submit(self, handle: Callable[[], None]) -> None:
        """Run `handle` as soon as everything that came before is handled."""
        if not self._queue and self.reached_s <= self._clock.now:
            handle()
            return
        self._queue.append(handle)
        if len(self._queue) == 1:
            self._clock.at(self.reached_s, self._rank, self._next)

    def _next(self) -> None:
        paused_until = self._clock.workers[self._rank].paused_until
        if paused_until > self._clock.now:
            self._free_s = max(self._free_s, paused_until)
        elif self.reached_s <= self._clock.now:
            self._queue.popleft()()
        if self._queue:
            self._clock.at(self.reached_s, self._rank, self._next)
