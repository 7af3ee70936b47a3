"""Virtual time: worker threads that run ordinary blocking code, exactly one at a time, on a simulated clock.

Workers pass a baton. A worker that must wait takes the next events off the heap itself. Callbacks (message
arrivals, faults) run in its thread; an event that resumes another worker hands that worker the baton. There
is no scheduler thread, so an event costs at most one switch of threads. Events are ordered by (time, rank,
order of creation), so nothing depends on how fast the real threads run: the same program gives the same run,
bit for bit.

The random state of torch, NumPy and `random` belongs to the worker and is swapped with the baton.
"""

from __future__ import annotations

import heapq
import random
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from paceline.errors import CommError, Timeout

_STACK_BYTES = 16 << 20
_numpy_random: Any = np.random  # its stubs lack get_bit_generator and set_bit_generator


AwaitedThing = str | Callable[[], str]
"""Describes what a worker waits for; a function if the description changes meanwhile."""


class _Unwind(BaseException):
    """Ends a worker's thread: the worker was killed, or the whole simulation stops."""


class VirtualWorker:
    """One virtual worker: a thread that runs only while it holds the baton."""

    def __init__(self, rank: int, body: Callable[[], object], seed: int) -> None:
        self.rank = rank
        self.body = body
        self.baton = threading.Lock()
        self.baton.acquire()
        self.thread: threading.Thread | None = None
        self.ticket = 0
        """How many times it has waited; an event that resumes an earlier wait is ignored."""
        self.waits_for: AwaitedThing = ""
        self.is_killed = False
        self.is_over = False
        self.owed_s = 0.0
        """Time of work that it has done, and that has not passed yet."""
        self.paused_until = 0.0
        self.result: object = None
        self._torch = torch.Generator().manual_seed(seed).get_state()
        self._numpy: np.random.BitGenerator = np.random.MT19937(seed & 0xFFFFFFFF)
        self._python = random.Random(seed).getstate()

    def save_random_state(self) -> None:
        """Keep the process's random state: this worker is about to stop running."""
        self._torch = torch.default_generator.get_state()
        self._numpy = _numpy_random.get_bit_generator()
        self._python = random.getstate()

    def load_random_state(self) -> None:
        """Give the process this worker's random state."""
        torch.default_generator.set_state(self._torch)
        _numpy_random.set_bit_generator(self._numpy)
        random.setstate(self._python)


class Signal:
    """Something that happens once and that workers wait for, in virtual time."""

    __slots__ = ("_waiting", "clock", "is_set")

    def __init__(self, clock: VirtualClock) -> None:
        self.clock = clock
        self._waiting: list[tuple[int, int]] = []
        self.is_set = False

    def set(self) -> None:
        """Resume all workers that wait for it, at the current time, in rank order."""
        if not self.is_set:
            self.is_set = True
            for rank, ticket in self._waiting:
                self.clock.resume_at(self.clock.now, rank, ticket)
            self._waiting.clear()

    def wait(self, awaited: AwaitedThing, timeout_s: float | None = None) -> None:
        """Block the running worker until set. Raises Timeout after `timeout_s` virtual seconds."""
        clock = self.clock
        if not self.is_set:
            clock.settle()
        if self.is_set:
            return
        worker = clock.running
        clock.refuse_in_handler(awaited)
        ticket = worker.ticket + 1
        self._waiting.append((worker.rank, ticket))
        if timeout_s is not None:
            clock.resume_at(clock.now + timeout_s, worker.rank, ticket)
        clock.block(awaited)
        if not self.is_set:
            self._waiting.remove((worker.rank, ticket))
            text = f"rank {worker.rank}: {_described(awaited)}: nothing for {timeout_s:g} s (virtual)"
            raise Timeout(text + clock.explain_wait())


class VirtualClock:
    """Virtual time: the current time, the heap of future events, and the baton."""

    def __init__(self, seed: int = 0) -> None:
        self.now = 0.0
        self.num_events = 0
        self.workers: list[VirtualWorker] = []
        self.running: VirtualWorker = None  # type: ignore[assignment]
        self.in_handler = -1
        """Rank whose handler runs right now, or -1."""
        self.explain_wait: Callable[[], str] = lambda: ""
        """Returns faults that may be the reason of an endless wait; added to errors about one."""
        self.on_work: Callable[[int, float, float], None] = lambda rank, start_s, end_s: None
        """Called when a worker's local work takes its time."""
        self._seed = seed
        self._heap: list[tuple[float, int, int, Callable[[], VirtualWorker | None]]] = []
        self._count = 0
        self._num_over = 0
        self._main = threading.Lock()
        self._failure: BaseException | None = None

    # Events

    def at(self, time_s: float, rank: int, action: Callable[[], VirtualWorker | None]) -> None:
        """Run `action` at `time_s`, among equal times in the order of ranks.

        A worker that the action returns gets the baton.
        """
        self._count += 1
        heapq.heappush(self._heap, (time_s, rank, self._count, action))

    def resume_at(self, time_s: float, rank: int, ticket: int) -> None:
        """Let the worker continue at `time_s` if it still is in the wait that has this ticket."""

        def resume() -> VirtualWorker | None:
            worker = self.workers[rank]
            if worker.ticket != ticket or worker.is_over:
                return None
            if worker.paused_until > self.now:
                self.resume_at(worker.paused_until, rank, ticket)
                return None
            return worker

        self.at(time_s, rank, resume)

    def sleep(self, seconds: float, awaited: str) -> None:
        """Let virtual time pass for the running worker."""
        self.refuse_in_handler(awaited)
        self.resume_at(self.now + seconds, self.running.rank, self.running.ticket + 1)
        self.block(awaited)

    def owe(self, seconds: float) -> None:
        """Let the running worker have worked for `seconds`; they pass before anybody can tell.

        Many small works are one event then.
        """
        self.running.owed_s += seconds

    def settle(self) -> None:
        """Let the time of the running worker's work pass: it is about to act on others, or to wait."""
        worker = self.running
        if self.in_handler < 0 and worker.owed_s > 0:
            seconds, worker.owed_s = worker.owed_s, 0.0
            self.on_work(worker.rank, self.now, self.now + seconds)
            self.sleep(seconds, "its own work")

    def block(self, awaited: AwaitedThing) -> None:
        """Stop the running worker until an event resumes it."""
        worker = self.running
        if worker.is_killed or self._failure is not None:
            raise _Unwind
        worker.ticket += 1
        worker.waits_for = awaited
        self._pass_on(worker)
        worker.waits_for = ""
        if worker.is_killed or self._failure is not None:
            raise _Unwind

    def refuse_in_handler(self, awaited: AwaitedThing) -> None:
        """Raise CommError if a message handler tries to wait."""
        if self.in_handler >= 0:
            raise CommError(
                f"rank {self.in_handler}: a message handler waits ({_described(awaited)});"
                " handlers must not block: return comm.deferred() and set it later"
            )

    def kill(self, rank: int) -> VirtualWorker | None:
        """An action for `at`: the worker's thread unwinds now and its code runs no further."""
        worker = self.workers[rank]
        worker.is_killed = True
        return None if worker.is_over else worker

    def alive(self) -> list[int]:
        """Ranks that were not killed."""
        return [w.rank for w in self.workers if not w.is_killed]

    # Running

    def run(
        self, bodies: Sequence[Callable[[], Any]], start_s: Sequence[float] | None = None, *, threads: int = 1
    ) -> list[Any]:
        """Run one body per worker until all are over; returns their results (None for a killed worker).

        Args:
            bodies: What each worker runs, by rank.
            start_s: Virtual time at which each worker starts; default: all at 0.
            threads: Number of torch's intra-op threads.

        Raises:
            CommError: All workers wait for each other.
            BaseException: What a worker raised; the others are unwound.
        """
        # A large odd factor keeps the streams of neighbouring ranks and seeds apart.
        self.workers = [
            VirtualWorker(r, body, (self._seed * 1_000_003 + r * 7919 + 1) & 0x7FFF_FFFF)
            for r, body in enumerate(bodies)
        ]
        for worker in self.workers:
            self.resume_at(start_s[worker.rank] if start_s else 0.0, worker.rank, 0)
        outside = VirtualWorker(-1, lambda: None, 0)
        outside.save_random_state()
        threads_before, stack = torch.get_num_threads(), threading.stack_size(_STACK_BYTES)
        torch.set_num_threads(threads)
        self._main.acquire()
        try:
            self._pass_on(None)
            self._wait_for_end()
        finally:
            threading.stack_size(stack)
            torch.set_num_threads(threads_before)
            outside.load_random_state()
        if self._failure is not None:
            raise self._failure
        return [w.result for w in self.workers]

    def _wait_for_end(self) -> None:
        try:
            self._main.acquire()
        except BaseException as error:  # Ctrl-C: the running worker stops at its next wait
            self._failure = error
            self._main.acquire()

    def _pass_on(self, worker: VirtualWorker | None) -> None:
        """Take events until one resumes a worker; return when `worker` has the baton again."""
        target = self._next()
        if target is worker:
            return
        if worker is not None and not worker.is_over:
            worker.save_random_state()
        if target is None:
            self._main.release()
            return
        target.load_random_state()
        self.running = target
        if target.thread is None:
            target.thread = threading.Thread(
                target=self._thread, args=(target,), name=f"paceline-worker-{target.rank}", daemon=True
            )
            target.thread.start()
        else:
            target.baton.release()
        if worker is not None and not worker.is_over:
            worker.baton.acquire()

    def _next(self) -> VirtualWorker | None:
        """Return the worker that runs next, or None when all are over."""
        while True:
            if self._failure is not None:
                return next((w for w in self.workers if w.thread is not None and not w.is_over), None)
            if self._num_over == len(self.workers):
                return None
            if not self._heap:
                self._failure = self._deadlock()
                continue
            time_s, _, _, action = heapq.heappop(self._heap)
            self.now = max(self.now, time_s)
            self.num_events += 1
            try:
                target = action()
            except BaseException as error:
                self._failure = error
                continue
            if target is not None:
                return target

    def _thread(self, worker: VirtualWorker) -> None:
        try:
            if not worker.is_killed:
                worker.result = worker.body()
                self.settle()
        except _Unwind:
            pass
        except BaseException as error:
            if self._failure is None and not worker.is_killed:
                if hasattr(error, "add_note"):  # from Python 3.11 on
                    error.add_note(f"raised by rank {worker.rank} at virtual time {self.now:.6f} s")
                self._failure = error
        worker.is_over = True
        self._num_over += 1
        self._pass_on(worker)

    def _deadlock(self) -> CommError:
        waiting = [w for w in self.workers if not w.is_over]
        shown = "; ".join(
            f"rank {w.rank} waits for {_described(w.waits_for) or 'its start'}" for w in waiting[:8]
        )
        more = f"; and {len(waiting) - 8} more" if len(waiting) > 8 else ""
        return CommError(
            f"deadlock at virtual time {self.now:.6f} s: no worker can continue: {shown}{more}"
            f"{self.explain_wait()}"
        )


def _described(awaited: AwaitedThing) -> str:
    return awaited if isinstance(awaited, str) else awaited()
