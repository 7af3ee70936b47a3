"""What the native fabric returns for an operation: in flight, over already, or never started."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from paceline import _core
from paceline.errors import CommError

if TYPE_CHECKING:
    from paceline.comm.native.communicator import CoreCommunicator


class NativeWork:
    """An operation of the core, and the time spent waiting for it."""

    __slots__ = ("_comm", "_error", "_operation")

    def __init__(self, comm: CoreCommunicator, operation: _core.Operation) -> None:
        self._comm = comm
        self._operation = operation
        self._error: CommError | None = None

    def wait(self, timeout_s: float | None = None) -> None:
        """Block until done; raise the operation's CommError."""
        if self._error is not None:
            raise self._error
        operation = self._operation
        try:
            if operation.is_done:
                operation.raise_failure()  # it may have failed while nobody waited
                return
            start = time.perf_counter()
            try:
                self._comm._core_group.wait(operation, -1.0 if timeout_s is None else timeout_s)
            finally:
                self._comm.ledger.wait_s += time.perf_counter() - start
        except CommError as error:
            self._error = error
            self._comm.unusable = self._comm.unusable or str(error)
            raise

    def is_done(self) -> bool:
        """Whether `wait` would not block."""
        return self._operation.is_done or self._comm._core_group.poll(self._operation)

    def exception(self) -> BaseException | None:
        """Return the error of a finished operation, else None."""
        if self._error is None and self.is_done():
            try:
                self._operation.raise_failure()
            except CommError as error:
                self._error = error
                self._comm.unusable = self._comm.unusable or str(error)
        return self._error


class FinishedWork:
    """An operation that was over when its call returned."""

    __slots__ = ()

    def wait(self, timeout_s: float | None = None) -> None:
        """Block until done; raise the operation's CommError."""

    def is_done(self) -> bool:
        """Whether `wait` would not block."""
        return True

    def exception(self) -> BaseException | None:
        """Return the error of a finished operation, else None."""
        return None


class FailedWork:
    """An operation that could not start."""

    __slots__ = ("_error",)

    def __init__(self, error: CommError) -> None:
        self._error = error

    def wait(self, timeout_s: float | None = None) -> None:
        """Block until done; raise the operation's CommError."""
        raise self._error

    def is_done(self) -> bool:
        """Whether `wait` would not block."""
        return True

    def exception(self) -> BaseException | None:
        """Return the error of a finished operation, else None."""
        return self._error


DONE = FinishedWork()
