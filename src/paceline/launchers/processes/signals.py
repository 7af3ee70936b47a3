"""The signals that end a job: raised as exceptions in the launcher's main thread, or noted for later."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

# What each `noted` block has received, the innermost last. Only the main thread adds to it.
_blocks: list[list[signal.Signals]] = []


class Stopped(BaseException):
    """The launcher received a signal that ends the job."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(f"received {number.name}")
        self.number = number


def number_of(error: KeyboardInterrupt | Stopped) -> signal.Signals:
    """The signal that `error` stands for."""
    return error.number if isinstance(error, Stopped) else signal.SIGINT


@contextlib.contextmanager
def raised(exception: Callable[[signal.Signals], BaseException] = Stopped) -> Iterator[None]:
    """Inside, each signal of `ENDING` raises `exception(signal)`. No effect outside the main thread."""

    def handle(number: int, _frame: FrameType | None) -> None:
        raise exception(signal.Signals(number))

    with _handled_by(handle):
        yield


@contextlib.contextmanager
def noted() -> Iterator[list[signal.Signals]]:
    """Inside, signals of `ENDING` are appended to the list that this yields; `check` raises the first.

    For launchers that call into an engine's C code, which an exception at an arbitrary point would break.
    No effect outside the main thread.
    """
    received: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    _blocks.append(received)
    try:
        with _handled_by(lambda number, _frame: received.append(signal.Signals(number))):
            yield received
    finally:
        _blocks.pop()


def check() -> None:
    """Raise `Stopped` if a signal has been noted."""
    if _blocks and _blocks[-1]:
        raise Stopped(_blocks[-1][0])


def is_urgent() -> bool:
    """Whether a second signal followed the first: the user does not want to wait."""
    return bool(_blocks) and len(_blocks[-1]) > 1


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
