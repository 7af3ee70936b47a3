"""The signals that end a job: as exceptions in the launcher's main thread, or noted for safe points."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

_noted: list[signal.Signals] = []


class Stopped(BaseException):
    """The launcher was told to stop."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(f"received {number.name}")
        self.sigval = number


@contextlib.contextmanager
def raised(exception: Callable[[signal.Signals], BaseException] = Stopped) -> Iterator[None]:
    """While inside, each of `ENDING` raises `exception(signal)`; only a process's main thread can."""

    def handle(number: int, _frame: FrameType | None) -> None:
        raise exception(signal.Signals(number))

    with _handled_by(handle):
        yield


@contextlib.contextmanager
def noted() -> Iterator[None]:
    """While inside, each of `ENDING` is only noted, until `check` raises it.

    For launchers that call into an engine's C code, which an exception out of nowhere would break.
    """
    _noted.clear()
    with _handled_by(lambda number, _frame: _noted.append(signal.Signals(number))):
        yield


def check() -> None:
    """Raise `Stopped` if a signal has been noted."""
    if _noted:
        raise Stopped(_noted[0])


def is_urgent() -> bool:
    """Whether another signal came after the first: somebody does not want to wait."""
    return len(_noted) > 1


@contextlib.contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in ENDING}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
