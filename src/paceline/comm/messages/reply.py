"""Replies on real fabrics: promises that a thread can wait for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from paceline.comm.ledger import Ledger
from paceline.errors import Timeout
from paceline.types import Message

Outcome = Message | BaseException


class Deferred:
    """A promise of a Message that is set once, from any thread.

    Args:
        waiting_for: What `wait` waits for, in errors.
        ledger: Where waiting time is counted; None: nowhere.
        timeout_s: How long `wait` waits, in seconds, unless it is told otherwise; None: for ever.
    """

    def __init__(
        self,
        waiting_for: str = "an answer",
        ledger: Ledger | None = None,
        *,
        timeout_s: float | None = None,
    ) -> None:
        self._waiting_for, self._ledger, self._timeout_s = waiting_for, ledger, timeout_s
        self._lock = threading.Lock()
        self._ready = threading.Event()
        self._outcome: Outcome | None = None
        self._callbacks: list[Callable[[Outcome], None]] = []
        self._extended_at = 0.0

    def extend(self) -> None:
        """The answer is on its way: `wait` counts its time from now."""
        self._extended_at = time.perf_counter()

    def wait(self, timeout_s: float | None = None) -> Message:
        """Block until the answer is here. Raises Timeout, PeerLost, or the handler's error."""
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        start = time.perf_counter()
        is_ready = self._ready.wait(timeout_s)
        while not is_ready and timeout_s is not None:
            left_s = max(start, self._extended_at) + timeout_s - time.perf_counter()
            if left_s <= 0:
                break
            is_ready = self._ready.wait(left_s)
        if self._ledger is not None:
            self._ledger.wait_s += time.perf_counter() - start
        if not is_ready:
            raise Timeout(f"{self._waiting_for}: nothing for {timeout_s:g} s. Is that rank alive?")
        if isinstance(self._outcome, Message):
            return self._outcome
        assert self._outcome is not None
        raise self._outcome

    def is_done(self) -> bool:
        """Whether `wait` would return (or raise) at once."""
        return self._ready.is_set()

    def set(self, message: Message) -> None:
        """Answer. A second answer is ignored: the first one is on its way."""
        self._finish(message)

    def fail(self, error: BaseException) -> None:
        """Answer with an error."""
        self._finish(error)

    def then(self, callback: Callable[[Outcome], None]) -> None:
        """Call `callback(outcome)` once set; at once if it is."""
        with self._lock:
            if self._outcome is None:
                self._callbacks.append(callback)
                return
        callback(self._outcome)

    def _finish(self, outcome: Outcome) -> None:
        with self._lock:
            if self._outcome is not None:
                return
            self._outcome = outcome
            callbacks, self._callbacks = self._callbacks, []
        self._ready.set()
        for callback in callbacks:
            callback(outcome)
