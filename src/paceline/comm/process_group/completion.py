"""Threads that complete futures when the core reports that their operation has ended.

Callbacks of a future run in the thread that completes it and may wait for other operations. So before a
thread serves a completion, it makes sure that another thread is there to take the next one.
"""

from __future__ import annotations

import atexit
import itertools
import threading
from typing import Protocol

from paceline import _core
from paceline.comm.native.communicator import engine

_NAP_S = 60.0
_JOIN_S = 5.0


class Completable(Protocol):
    """Something to be told that its operation is over."""

    def completed(self) -> None:
        """Called once, by any thread."""


class Completer:
    """Serves one engine. Its threads are joined at exit: one that still ran would abort the process."""

    def __init__(self, core: _core.Engine) -> None:
        self.core = core
        self._watched: dict[int, Completable] = {}
        self._tokens = itertools.count(1)
        self._lock = threading.Lock()
        self._num_idle = 0
        self._threads: set[threading.Thread] = set()
        self._is_closed = False
        atexit.register(self.close)

    def watch(self, operation: _core.Operation, work: Completable) -> None:
        """Call `work.completed()` when the operation is over; now if it is."""
        token = next(self._tokens)
        self._watched[token] = work
        if self._is_closed or not self.core.watch(operation, token):
            del self._watched[token]
            work.completed()
        elif not self._threads:
            with self._lock:
                self._start()

    def _start(self) -> None:
        self._num_idle += 1
        thread = threading.Thread(target=self._serve, name="paceline-completion", daemon=True)
        self._threads.add(thread)
        thread.start()

    def _serve(self) -> None:
        while True:
            tokens = self.core.take_completed(_NAP_S, 1)
            if self._is_closed:
                break
            if not tokens:
                continue
            with self._lock:
                self._num_idle -= 1
                if self._num_idle == 0:
                    self._start()
            self._watched.pop(tokens[0]).completed()
            with self._lock:
                self._num_idle += 1
                if self._num_idle > 2:  # a burst of callbacks that waited is over
                    self._num_idle -= 1
                    break
        with self._lock:
            self._threads.discard(threading.current_thread())

    def close(self) -> None:
        """Join the threads; futures of operations still in flight stay incomplete."""
        self._is_closed = True
        self.core.close_completions()
        for thread in list(self._threads):
            if thread is not threading.current_thread():
                thread.join(_JOIN_S)


_completer: Completer | None = None


def completer() -> Completer:
    """Return the threads of this process's engine, started when first needed."""
    global _completer  # noqa: PLW0603  one engine per process, one completer per engine
    core = engine()
    if _completer is None or _completer.core is not core:
        _completer = Completer(core)
    return _completer
