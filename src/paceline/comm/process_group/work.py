"""What the backend returns: `torch.distributed.Work` over an operation of the core, and its future."""

from __future__ import annotations

import datetime
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from paceline.comm.native.work import DONE, NativeWork
from paceline.comm.process_group.completion import completer
from paceline.comm.process_group.typed_future import typed_future
from paceline.errors import CommError, Timeout
from paceline.types import Work

Result = list[torch.Tensor] | list[list[torch.Tensor]]
_lock = threading.Lock()  # of promises: threads that complete operations, and those that ask for futures


def told(error: CommError) -> CommError:
    """Return the error with the words by which callers of other backends know a timeout."""
    return Timeout(f"{error} (the timeout has passed)") if isinstance(error, Timeout) else error


class C10dWork(dist.Work):
    """One operation, or several of one group that are over when the last is.

    `result` is what the future will hold. `finish` runs once after the bytes have arrived, before anybody is
    told: it copies what could not be received in place.
    """

    def __init__(self, native: Work, result: Sequence[Any], finish: Callable[[], None] | None = None) -> None:
        dist.Work.__init__(self)
        self._native = native
        self._result = list(result)
        self._finish = finish
        self._lock = threading.Lock() if finish is not None else None
        self._error: BaseException | None = None
        self._future: torch.futures.Future | None = None
        self._promise: torch.futures.Future | None = None
        self._source: int | None = None
        self._is_watched = self._is_over = False

    def wait(self, timeout: datetime.timedelta | None = None) -> bool:
        """Block until done; raise PeerLost, Timeout or Mismatch naming the culprit. Always returns True."""
        native = self._native
        if native is not DONE:
            seconds = 0.0 if timeout is None else timeout.total_seconds()
            try:
                native.wait(seconds if seconds > 0 else None)
            except CommError as error:
                self._error = told(error)
                raise self._error from None
        if self._finish is not None:
            self._settle()
        return True

    def _settle(self) -> None:
        assert self._lock is not None
        with self._lock:
            finish, error = self._finish, self._error
            if finish is not None and error is None:
                finish()
            self._finish = None

    def is_completed(self) -> bool:
        """Whether `wait` would return at once."""
        return self._native.is_done()

    def is_success(self) -> bool:
        """Whether it is over without an error."""
        return self._native.is_done() and self.exception() is None

    def exception(self) -> BaseException | None:
        """Return the error of a finished operation."""
        return self._error or self._native.exception()

    def result(self) -> list[torch.Tensor]:
        """Return the output tensors, after waiting."""
        self.wait()
        first = self._result[0] if self._result else None
        return list(first) if isinstance(first, list) else list(self._result)

    def synchronize(self) -> None:
        """CPU operations have no stream to synchronise: wait."""
        self.wait()

    def source_rank(self) -> int:
        """Rank in the group that a receive got its message from."""
        if self._source is None:
            raise RuntimeError("source_rank: only a receive has a source")
        return int(self._native._operation.peer) if isinstance(self._native, NativeWork) else self._source

    _source_rank = source_rank

    def get_future(self) -> torch.futures.Future:
        """Future of the list of output tensors; it raises the operation's error."""
        if self._future is None:
            self._future = self._make_future()
        return self._future

    def _make_future(self) -> Any:
        if self._is_typed():
            return self._make_typed_future()
        promise: torch.futures.Future = torch.futures.Future()
        if self._native.is_done() and self._native.exception() is None:
            self.wait()
            promise.set_result(self._value())
            return promise
        # An exception set from Python is stored as a value, which C++ readers take for tensors: set a marker
        # instead, and raise in `then`.
        future = promise.then(_unwrap)
        self._promises(promise)
        return future

    def _is_typed(self) -> bool:
        """DDP's built-in FP16 hook reads its future in C++, where a Python list is no list of tensors."""
        first = self._result[0] if self._result else None
        return isinstance(first, torch.Tensor) and first.dtype == torch.float16

    def _make_typed_future(self) -> Any:
        promise: torch.futures.Future = torch.futures.Future()
        future = typed_future(promise.then(_unwrap), self._result)
        self._promises(promise)
        return future

    def _promises(self, promise: Any) -> None:
        """Have `promise` fulfilled, once, also if the operation is watched already or over."""
        with _lock:
            self._promise = promise
            is_over, is_watched = self._is_over, self._is_watched
        if is_over:
            self.completed()
        elif not is_watched:
            self._watch()

    def _value(self) -> list[Any]:
        first = self._result[0] if self._result else None
        return first if len(self._result) == 1 and isinstance(first, list) else self._result

    def _watch(self) -> None:
        """Have `completed` called when the operation ends, whoever waits."""
        self._is_watched = True
        if isinstance(self._native, NativeWork):
            completer().watch(self._native._operation, self)
        else:
            self.completed()

    def completed(self) -> None:
        """Called once the bytes have arrived: finish, then fulfil the future."""
        try:
            self.wait()
        except Exception as error:
            self._error = error
        with _lock:
            self._is_over = True
            promise, self._promise = self._promise, None
        if promise is not None:
            promise.set_result(_Failed(self._error) if self._error is not None else self._value())


class _Failed:
    """The marker of an error in a promise."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


def _unwrap(promise: torch.futures.Future) -> Any:
    value = promise.value()
    if isinstance(value, _Failed):
        raise value.error
    return value


class _Finished(dist.Work):
    """A synchronous call that was over when it returned: one object serves all."""

    def wait(self, timeout: datetime.timedelta | None = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def is_success(self) -> bool:
        return True

    def exception(self) -> None:
        return None

    def result(self) -> list[torch.Tensor]:
        return []

    def get_future(self) -> torch.futures.Future:
        future: torch.futures.Future = torch.futures.Future()
        future.set_result([])
        return future


FINISHED = _Finished()
