"""What the backend returns: `torch.distributed.Work` over an operation of the core, and its future."""

from __future__ import annotations

import datetime
import threading
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from paceline.comm.native.work import DONE, NativeWork
from paceline.comm.process_group.completion import completer
from paceline.comm.process_group.typed_future import typed_future
from paceline.errors import CommError, Timeout
from paceline.types import Work

Result = Sequence[torch.Tensor | list[torch.Tensor]]
"""What a future holds: tensors, or for a gather one list of them."""
_lock = threading.Lock()  # of promises: threads complete operations while others ask for futures


def as_torch_says(error: CommError) -> CommError:
    """Return the error, in case of a timeout with the words that users of other backends look for."""
    return Timeout(f"{error} (the timeout has passed)") if isinstance(error, Timeout) else error


class C10dWork(dist.Work):
    """One operation, or several of one group that are over when the last is.

    Args:
        native: The operation on the native fabric.
        result: What the future will hold.
        finish: Runs once after the bytes have arrived and before the work counts as done. It copies what
            could not be received in place.
        source: Of a receive: the rank that it names, -1 for any.
    """

    def __init__(
        self,
        native: Work,
        result: Result,
        finish: Callable[[], None] | None = None,
        source: int | None = None,
    ) -> None:
        dist.Work.__init__(self)
        self.native = native
        self.finish = finish
        """None also once it has run."""
        self._result = list(result)
        self._lock = threading.Lock() if finish is not None else None
        self._error: BaseException | None = None
        self._future: torch.futures.Future | None = None
        self._promise: torch.futures.Future | None = None
        self._source = source
        self._is_watched = self._is_over = False

    def wait(self, timeout: datetime.timedelta | None = None) -> bool:
        """Block until done; raise PeerLost, Timeout or Mismatch naming the culprit. Always returns True."""
        native = self.native
        if native is not DONE:
            seconds = 0.0 if timeout is None else timeout.total_seconds()
            try:
                native.wait(seconds if seconds > 0 else None)
            except CommError as error:
                self._error = as_torch_says(error)
                raise self._error from None
        if self.finish is not None:
            self._settle()
        return True

    def _settle(self) -> None:
        assert self._lock is not None
        with self._lock:
            finish, error = self.finish, self._error
            if finish is not None and error is None:
                finish()
            self.finish = None

    def is_completed(self) -> bool:
        """Whether `wait` would return at once."""
        return self.native.is_done()

    def is_success(self) -> bool:
        """Whether it is over without an error."""
        return self.native.is_done() and self.exception() is None

    def exception(self) -> BaseException | None:
        """Return the error of a finished operation."""
        return self._error or self.native.exception()

    def result(self) -> list[torch.Tensor]:
        """Return the output tensors, after waiting."""
        self.wait()
        return self._tensors()

    def _tensors(self) -> list[torch.Tensor]:
        first = self._result[0] if self._result else None
        return list(first) if isinstance(first, list) else list(self._result)  # type: ignore[arg-type]

    def synchronize(self) -> None:
        """Wait: operations on the CPU have no stream to synchronise with."""
        self.wait()

    def source_rank(self) -> int:
        """Rank in the group whose message a receive got."""
        if self._source is None:
            raise RuntimeError("source_rank: only a receive has a source")
        return int(self.native.operation.peer) if isinstance(self.native, NativeWork) else self._source

    _source_rank = source_rank

    def get_future(self) -> torch.futures.Future:
        """Future of the list of output tensors; it raises the operation's error."""
        if self._future is None:
            self._future = self._make_future()
        return self._future

    def _make_future(self) -> torch.futures.Future:
        if self._is_typed():
            return self._make_typed_future()
        promise: torch.futures.Future = torch.futures.Future()
        if self.native.is_done() and self.native.exception() is None:
            self.wait()
            promise.set_result(self._value())
            return promise
        # An exception set from Python is stored as a value, which C++ readers take for tensors: set a marker
        # instead, and raise in `then`.
        future = promise.then(_unwrap)
        self._fulfil(promise)
        return future

    def _is_typed(self) -> bool:
        """Whether C++ may read the future, as DDP's built-in FP16 hook does; that needs a typed list."""
        first = self._result[0] if self._result else None
        return isinstance(first, torch.Tensor) and first.dtype == torch.float16

    def _make_typed_future(self) -> torch.futures.Future:
        promise: torch.futures.Future = torch.futures.Future()
        future: torch.futures.Future = typed_future(promise.then(_unwrap), self._tensors())
        self._fulfil(promise)
        return future

    def _fulfil(self, promise: torch.futures.Future) -> None:
        """Have `promise` set once when the operation is over, also if it is already watched or over."""
        with _lock:
            self._promise = promise
            is_over, is_watched = self._is_over, self._is_watched
        if is_over:
            self.completed()
        elif not is_watched:
            self.watch()

    def _value(self) -> Result:
        first = self._result[0] if self._result else None
        return first if len(self._result) == 1 and isinstance(first, list) else self._result

    def watch(self) -> None:
        """Have `completed` called when the operation ends, even if no thread waits for it."""
        self._is_watched = True
        if isinstance(self.native, NativeWork):
            completer().watch(self.native.operation, self)
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


def _unwrap(promise: torch.futures.Future) -> object:
    value = promise.value()
    if isinstance(value, _Failed):
        raise value.error
    return value


class _Finished(dist.Work):
    """The work of a synchronous call, which was over when it returned; one object serves all calls."""

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


def for_cpp(work: dist.Work) -> dist.Work:
    """Return a work of this backend in a form that C++ may keep and wait for without its Python half.

    A wait of the C++ half alone, once Python has dropped its own, would last for ever.
    """
    if not isinstance(work, (C10dWork, _Finished)):
        return work
    # torch has no public name for it.
    make: Callable[[torch.futures.Future], dist.Work] = torch._C._distributed_c10d._create_work_from_future  # type: ignore[attr-defined]  # noqa: SLF001
    return make(work.get_future())
