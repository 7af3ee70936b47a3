"""What the native fabric returns for an operation: in flight, over already, or never started."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeAlias

from paceline import _core
from paceline.comm.ledger import Ledger
from paceline.errors import CommError

CoreGroup: TypeAlias = "_core.SharedMemoryGroup | _core.NetworkGroup | _core.HierarchicalGroup"


class NativeWork:
    """An operation of the core, and the time spent waiting for it.

    Args:
        operation: The core's operation, under way.
        group: The core's group that it runs in.
        ledger: Counts the seconds that `wait` blocks.
        on_failure: Called with the operation's error when it is first seen.
    """

    __slots__ = ("_error", "_group", "_ledger", "_on_failure", "_operation")

    def __init__(
        self,
        operation: _core.Operation,
        group: CoreGroup,
        ledger: Ledger,
        on_failure: Callable[[CommError], None],
    ) -> None:
        self._operation = operation
        self._group = group
        self._ledger = ledger
        self._on_failure = on_failure
        self._error: CommError | None = None

    @property
    def operation(self) -> _core.Operation:
        """The operation as the core knows it, for layers that drive the core themselves."""
        return self._operation

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
                self._group.wait(operation, -1.0 if timeout_s is None else timeout_s)
            finally:
                self._ledger.wait_s += time.perf_counter() - start
        except CommError as error:
            self._error = error
            self._on_failure(error)
            raise

    def is_done(self) -> bool:
        """Whether `wait` would not block."""
        return self._operation.is_done or self._group.poll(self._operation)

    def exception(self) -> BaseException | None:
        """Return the error of a finished operation, else None."""
        if self._error is None and self.is_done():
            try:
                self._operation.raise_failure()
            except CommError as error:
                self._error = error
                self._on_failure(error)
        return self._error


class FinishedWork:
    """An operation that was over when its call returned."""

    __slots__ = ()

    def wait(self, timeout_s: float | None = None) -> None:
        """Return at once: nothing is left to wait for."""

    def is_done(self) -> bool:
        return True

    def exception(self) -> BaseException | None:
        return None


class FailedWork:
    """An operation that could not start."""

    __slots__ = ("_error",)

    def __init__(self, error: CommError) -> None:
        self._error = error

    def wait(self, timeout_s: float | None = None) -> None:
        raise self._error

    def is_done(self) -> bool:
        return True

    def exception(self) -> BaseException | None:
        return self._error


DONE = FinishedWork()
