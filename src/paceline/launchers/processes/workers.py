"""The worker processes of one host: started, their output read, and ended without a trace."""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from paceline.launchers.processes import watchdog
from paceline.launchers.processes.worker_process import WorkerCommand, WorkerProcess

_CHUNK_BYTES = 1 << 16
_DRAIN_S = 2.0


class OutputSink(Protocol):
    """Where workers' output goes: a console, or an object that forwards it to one."""

    def line(self, rank: int, text: str, *, error: bool = False) -> None: ...

    def bar(self, rank: int, text: str) -> None: ...

    def end_bar(self) -> None: ...


class Workers:
    """All workers of one host, and the thread that reads their output and sees their deaths in order."""

    def __init__(self, output: OutputSink) -> None:
        self._output = output
        self._token = secrets.token_hex(16)
        self._watchdog = _start_watchdog(self._token)
        self._selector = selectors.DefaultSelector()
        self._reader: threading.Thread | None = None
        self._closing = threading.Event()
        self.all: list[WorkerProcess] = []

    def start(self, commands: Mapping[int, WorkerCommand], *, directory: Path | None = None) -> None:
        """Start one process per rank (the key) in `directory`; None: the current one."""
        self._closing.clear()
        for rank, command in commands.items():
            environment = {**command.environment, watchdog.VARIABLE: self._token}
            worker = WorkerProcess(rank, WorkerCommand(command.words, environment), directory)
            self.all.append(worker)
            for fd in (worker.out_fd, worker.err_fd, worker.death_fd):
                self._selector.register(fd, selectors.EVENT_READ, worker)
        self._reader = threading.Thread(target=self._read, name="paceline-output", daemon=True)
        self._reader.start()

    @property
    def running(self) -> list[WorkerProcess]:
        """The workers that have not ended."""
        return [w for w in self.all if w.exit_code is None]

    def stop(self, grace_s: float) -> None:
        """SIGTERM, `grace_s` seconds, then SIGKILL; afterwards no process of this host's job is left."""
        try:
            for worker in self.running:
                worker.signal(signal.SIGTERM)
            deadline = time.monotonic() + grace_s
            while self.running and time.monotonic() < deadline:
                time.sleep(0.02)
        finally:
            self.kill()

    def kill(self) -> None:
        """End every process of the job at once, grandchildren too, and show their last output."""
        for worker in self.running:
            worker.signal(signal.SIGKILL)
        watchdog.kill_marked(self._token)
        self._closing.set()
        if self._reader is not None:
            self._reader.join(_DRAIN_S + 10.0)
            self._reader = None
        self._output.end_bar()

    def forget(self) -> None:
        """Drop ended workers, so that others can be started in their place."""
        for worker in self.all:
            worker.close()
        self.all = []
        self._selector.close()
        self._selector = selectors.DefaultSelector()

    def close(self) -> None:
        """End all workers and dismiss the watchdog."""
        self.kill()
        self.forget()
        self._selector.close()
        assert self._watchdog.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._watchdog.stdin.write(watchdog.DISMISS)
            self._watchdog.stdin.close()
        self._watchdog.wait(10)

    def _read(self) -> None:
        """Body of the reading thread: ends when all streams have, or soon after closing began."""
        deadline: float | None = None
        while self._selector.get_map():
            is_holding = any(w.traceback_keeper.is_holding for w in self.all)
            for key, _ in self._selector.select(0.1 if is_holding or self._closing.is_set() else 0.5):
                if key.fd == key.data.death_fd:
                    self._selector.unregister(key.fd)
                    self._on_death(key.data)
                elif not self._drain(key.data, key.fd, limit=1):
                    self._selector.unregister(key.fd)
            now = time.monotonic()
            for worker in self.all:
                if worker.exit_code is None:
                    self._show(worker, worker.traceback_keeper.stale(now))
            if self._closing.is_set():
                deadline = deadline or now + _DRAIN_S
                if now > deadline:
                    return

    def _on_death(self, worker: WorkerProcess) -> None:
        for fd in (worker.out_fd, worker.err_fd):
            if fd in self._selector.get_map() and not self._drain(worker, fd, limit=1 << 10):
                self._selector.unregister(fd)
        worker.reap()
        if worker.exit_code == 0:
            self._show(worker, worker.traceback_keeper.release())

    def _drain(self, worker: WorkerProcess, fd: int, *, limit: int) -> bool:
        """Read up to `limit` chunks; False at the stream's end."""
        for _ in range(limit):
            try:
                data = os.read(fd, _CHUNK_BYTES)
            except BlockingIOError:
                return True
            self._emit(worker, fd, worker.lines[fd].feed(data) if data else worker.lines[fd].finish())
            if not data:
                return False
        return True

    def _emit(self, worker: WorkerProcess, fd: int, lines: Iterator[tuple[str, bool]]) -> None:
        for text, is_whole in lines:
            if not is_whole:
                self._output.bar(worker.rank, text)
            elif fd == worker.err_fd:
                # torch's exception hook writes the rank too; once is enough.
                text = text.removeprefix(f"[rank{worker.rank}]: ")
                self._show(worker, worker.traceback_keeper.add(text, time.monotonic()))
            else:
                self._output.line(worker.rank, text)

    def _show(self, worker: WorkerProcess, lines: Sequence[str]) -> None:
        for line in lines:
            self._output.line(worker.rank, line, error=True)


def _start_watchdog(token: str) -> subprocess.Popen[bytes]:
    # Without the mark of an outer launcher: if that one ends this job, the watchdog must outlive it to end
    # the workers.
    environment = {k: v for k, v in os.environ.items() if k != watchdog.VARIABLE}
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(Path(watchdog.__file__)), token],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
