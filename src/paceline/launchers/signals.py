"""The signals that end a job, as exceptions in the launcher's main thread."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopped(BaseException):
    """The launcher was told to stop."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(f"received {number.name}")
        self.sigval = number


@contextlib.contextmanager
def raised(exception: Callable[[signal.Signals], BaseException] = Stopped) -> Iterator[None]:
    """While inside, each of `ENDING` raises `exception(signal)`; only a process's main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        raise exception(signal.Signals(number))

    before = {number: signal.signal(number, handle) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
