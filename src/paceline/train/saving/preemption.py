"""SIGTERM: all ranks agree on the step after which they stop, also when they sit in a collective.

A signal reaches Python code only between two bytecodes of the main thread, which may be waiting inside a
collective for a rank that will never come. So the C-level handler writes to a pipe (`set_wakeup_fd`), a
small thread reads it and asks the others through the job's store. Every rank's thread answers with the step
its main thread is in; the largest answer is the last step of all. Nobody begins a later step before all have
answered, and the answers need no main thread, so nobody waits for a rank that has stopped.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time

from torch._C._distributed_c10d import Store

from paceline.errors import CommError

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: stopped on request with a checkpoint; run again to continue."""
_ANSWER_TIMEOUT_S = 60.0


class Preempted(SystemExit):
    """Raised at a step boundary, after the checkpoint was saved; ends the process with EXIT_CODE."""

    def __init__(self, checkpoint: str, step: int, *, is_main: bool) -> None:
        super().__init__(EXIT_CODE)
        if is_main:
            text = f"saved {checkpoint} after step {step}; run the same command again to continue"
            print(f"paceline: SIGTERM: {text}", file=sys.stderr, flush=True)


class StopAgreement:
    """Watches for SIGTERM on any rank. Must be made in the main thread; at most one per process."""

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._lock = threading.Lock()
        self._begun = 0  # steps that the main thread has begun
        self._answered = False
        self._last_step: int | None = None
        self._agreed = threading.Event()
        self._closed = threading.Event()
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        self._old_handler = signal.signal(signal.SIGTERM, lambda *_: None)
        self._old_descriptor = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="paceline-stop", daemon=True)
        self._thread.start()

    def must_stop(self, finished: int, *, may_stop: bool = True) -> bool:
        """Called before each step with the number of finished ones: whether this was the last.

        `may_stop=False` (inside an accumulation window) puts the stop off, on all ranks alike.
        """
        with self._lock:
            if not self._answered:
                self._begun = finished + 1
                return False
        if not self._agreed.wait(_ANSWER_TIMEOUT_S):
            raise CommError(
                f"rank {self._rank}: a rank was asked to stop (SIGTERM), and after {_ANSWER_TIMEOUT_S:g} s"
                " not all ranks have said at which step they are: one of them is gone"
            )
        assert self._last_step is not None
        return may_stop and finished >= self._last_step

    def close(self) -> None:
        """Stop watching and give the signal back; idempotent."""
        if self._closed.is_set():
            return
        self._closed.set()
        signal.set_wakeup_fd(self._old_descriptor)
        signal.signal(signal.SIGTERM, self._old_handler or signal.SIG_DFL)
        os.write(self._writer, b"\0")
        self._thread.join(5)
        os.close(self._reader)
        os.close(self._writer)

    def _watch(self) -> None:
        interval_s = 0.25 + self._size / 500  # thousands of ranks must not drown the store
        try:
            while not self._closed.is_set():
                ready, _, _ = select.select([self._reader], [], [], interval_s)
                received = os.read(self._reader, 64).count(signal.SIGTERM) if ready else 0
                if received:  # twice is common: an agent passes on what the whole group got already
                    self._store.set("stop/asked", str(self._rank))
                if not self._answered and self._store.check(["stop/asked"]):
                    self._answer()
                if self._answered and not self._agreed.is_set():
                    self._collect()
        except RuntimeError:  # the store is gone: its host has ended, and so will we
            return

    def _answer(self) -> None:
        with self._lock:
            self._answered = True
            self._store.set(f"stop/at/{self._rank}", str(self._begun))

    def _collect(self) -> None:
        keys = [f"stop/at/{r}" for r in range(self._size)]
        deadline = time.monotonic() + _ANSWER_TIMEOUT_S
        while not self._closed.is_set() and time.monotonic() < deadline:
            if self._store.check(keys):
                self._last_step = max(int(self._store.get(key)) for key in keys)
                self._agreed.set()
                return
            time.sleep(0.05)
