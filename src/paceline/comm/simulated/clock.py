"""Virtual time: worker threads that run ordinary blocking code, exactly one at a time, on a simulated clock.

Workers pass a baton. Whoever must wait takes the next events off the heap itself: callbacks (message
arrivals, faults) run on the spot; an event that resumes another worker hands that worker the baton. There is
no scheduler thread, so an event costs at most one switch. Events are ordered by (time, rank, order of
creation): nothing depends on how fast the real threads run, and the same program gives the same run, bit for
bit.

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


What = str | Callable[[], str]
"""What a worker waits for, in words; a function when it changes while it waits."""


class _Unwind(BaseException):
    """Ends a worker's thread: it was killed, or the whole simulation stops."""


class Worker:
    """One virtual worker: a thread that runs only while it holds the baton."""

    def __init__(self, rank: int, body: Callable[[], Any], seed: int) -> None:
        self.rank = rank
        self.body = body
        self.baton = threading.Lock()
        self.baton.acquire()
        self.thread: threading.Thread | None = None
        self.ticket = 0
        self.waits_for: What = ""
        self.is_killed = False
        self.is_over = False
        self.paused_until = 0.0
        self.result: Any = None
        self._torch = torch.Generator().manual_seed(seed).get_state()
        self._numpy: Any = np.random.MT19937(seed & 0xFFFFFFFF)
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
    """Something that happens once; workers wait for it in virtual time."""

    __slots__ = ("_waiting", "is_set", "world")

    def __init__(self, world: World) -> None:
        self.world = world
        self._waiting: list[tuple[int, int]] = []
        self.is_set = False

    def set(self) -> None:
        """Resume everybody who waits, at the current time, in rank order."""
        if not self.is_set:
            self.is_set = True
            for rank, ticket in self._waiting:
                self.world.resume_at(self.world.now, rank, ticket)
            self._waiting.clear()

    def wait(self, what: What, timeout_s: float | None = None) -> None:
        """Block the running worker until set. Raises Timeout after `timeout_s` virtual seconds."""
        if self.is_set:
            return
        world = self.world
        worker = world.running
        world.refuse_in_handler(what)
        ticket = worker.ticket + 1
        self._waiting.append((worker.rank, ticket))
        if timeout_s is not None:
            world.resume_at(world.now + timeout_s, worker.rank, ticket)
        world.block(what)
        if not self.is_set:
            self._waiting.remove((worker.rank, ticket))
            said = f"rank {worker.rank}: {_say(what)}: nothing for {timeout_s:g} s (virtual)"
            raise Timeout(said + world.explain())


class World:
    """The clock, the event heap and the baton."""

    def __init__(self, seed: int = 0) -> None:
        self.now = 0.0
        self.num_events = 0
        self.workers: list[Worker] = []
        self.running: Worker = None  # type: ignore[assignment]
        self.in_handler = -1
        """Rank whose handler runs right now, or -1."""
        self.explain: Callable[[], str] = lambda: ""
        """Faults that may be why somebody waits in vain: added to errors that say so."""
        self._seed = seed
        self._heap: list[tuple[float, int, int, Callable[[], Worker | None]]] = []
        self._count = 0
        self._num_over = 0
        self._main = threading.Lock()
        self._failure: BaseException | None = None

    # -- events --------------------------------------------------------------------------------------------

    def at(self, time_s: float, rank: int, action: Callable[[], Worker | None]) -> None:
        """Run `action` at `time_s`; `rank` breaks ties. A worker that it returns gets the baton."""
        self._count += 1
        heapq.heappush(self._heap, (time_s, rank, self._count, action))

    def resume_at(self, time_s: float, rank: int, ticket: int) -> None:
        """Let the worker run on at `time_s`, unless it has done so since it took that ticket."""

        def resume() -> Worker | None:
            worker = self.workers[rank]
            if worker.ticket != ticket or worker.is_over:
                return None
            if worker.paused_until > self.now:
                self.resume_at(worker.paused_until, rank, ticket)
                return None
            return worker

        self.at(time_s, rank, resume)

    def sleep(self, seconds: float, what: str) -> None:
        """Let virtual time pass for the running worker."""
        self.refuse_in_handler(what)
        self.resume_at(self.now + seconds, self.running.rank, self.running.ticket + 1)
        self.block(what)

    def block(self, what: What) -> None:
        """Stop the running worker until an event resumes it."""
        worker = self.running
        if worker.is_killed or self._failure is not None:
            raise _Unwind
        worker.ticket += 1
        worker.waits_for = what
        self._pass_on(worker)
        worker.waits_for = ""
        if worker.is_killed or self._failure is not None:
            raise _Unwind

    def refuse_in_handler(self, what: What) -> None:
        """Raise CommError if a message handler tries to wait."""
        if self.in_handler >= 0:
            raise CommError(
                f"rank {self.in_handler}: a message handler waits ({_say(what)}); handlers must not block: "
                "return comm.deferred() and set it later"
            )

    def kill(self, rank: int) -> Worker | None:
        """Action: the worker's thread unwinds now and its code runs no further."""
        worker = self.workers[rank]
        worker.is_killed = True
        return None if worker.is_over else worker

    def alive(self) -> list[int]:
        """Ranks that were not killed."""
        return [w.rank for w in self.workers if not w.is_killed]

    # -- running -------------------------------------------------------------------------------------------

    def run(
        self, bodies: Sequence[Callable[[], Any]], start_s: Sequence[float] | None = None, *, threads: int = 1
    ) -> list[Any]:
        """Run one body per worker until all are over; returns their results (None for a killed worker).

        Raises what a worker raised (the others are unwound), or CommError when all wait for each other.
        """
        # A large odd factor keeps the streams of neighbouring ranks and seeds apart.
        self.workers = [
            Worker(r, body, (self._seed * 1_000_003 + r * 7919 + 1) & 0x7FFF_FFFF)
            for r, body in enumerate(bodies)
        ]
        for worker in self.workers:
            self.resume_at(start_s[worker.rank] if start_s else 0.0, worker.rank, 0)
        outside = Worker(-1, lambda: None, 0)
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
        except BaseException as error:  # Ctrl-C: let whoever runs stop at its next wait
            self._failure = error
            self._main.acquire()

    def _pass_on(self, worker: Worker | None) -> None:
        """Take events until one lets a worker run; return when the baton is back with `worker`."""
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

    def _next(self) -> Worker | None:
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

    def _thread(self, worker: Worker) -> None:
        try:
            if not worker.is_killed:
                worker.result = worker.body()
        except _Unwind:
            pass
        except BaseException as error:
            if self._failure is None and not worker.is_killed:
                error.add_note(f"raised by rank {worker.rank} at virtual time {self.now:.6f} s")
                self._failure = error
        worker.is_over = True
        self._num_over += 1
        self._pass_on(worker)

    def _deadlock(self) -> CommError:
        waiting = [w for w in self.workers if not w.is_over]
        shown = "; ".join(f"rank {w.rank} waits for {_say(w.waits_for) or 'its start'}" for w in waiting[:8])
        more = f"; and {len(waiting) - 8} more" if len(waiting) > 8 else ""
        return CommError(
            f"deadlock at virtual time {self.now:.6f} s: nobody can go on: {shown}{more}{self.explain()}"
        )


def _say(what: What) -> str:
    return what if isinstance(what, str) else what()
