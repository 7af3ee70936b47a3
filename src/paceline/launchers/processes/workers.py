"""The worker processes of one host: started, listened to, and ended without a trace."""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from paceline.launchers.processes import orphan_guard
from paceline.launchers.processes.failure import Ending
from paceline.launchers.processes.output import LineReader, TracebackKeeper

_CHUNK_BYTES = 1 << 16
_DRAIN_S = 2.0


class Listener(Protocol):
    """Who is told what workers say: a console, or whatever passes it on to one."""

    def line(self, rank: int, text: str, *, error: bool = False) -> None: ...

    def bar(self, rank: int, text: str) -> None: ...

    def end_bar(self) -> None: ...


class Worker:
    """One process: its rank, its streams, how it ended."""

    def __init__(
        self, rank: int, command: Sequence[str], environment: Mapping[str, str], cwd: Path | None = None
    ) -> None:
        # Its own session: a Ctrl-C at the terminal reaches the launcher alone, which then stops the workers
        # in order; and the whole group can be signalled at once.
        self._process = subprocess.Popen(
            command,
            env=dict(environment),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._process.stdout is not None and self._process.stderr is not None
        self.rank = rank
        self.pid = self._process.pid
        self.out_fd = self._process.stdout.fileno()
        self.err_fd = self._process.stderr.fileno()
        self.death_fd = os.pidfd_open(self.pid)
        self.lines = {self.out_fd: LineReader(), self.err_fd: LineReader()}
        self.keeper = TracebackKeeper()
        self.exit_code: int | None = None
        """As of subprocess: negative for a signal; None while running."""
        self.ended_s = 0.0
        self.was_told_to_stop = False
        for fd in (self.out_fd, self.err_fd):
            os.set_blocking(fd, False)

    def reap(self) -> None:
        """Record the exit of a process that has ended."""
        self.ended_s = time.monotonic()
        self.exit_code = self._process.wait()

    def signal(self, number: signal.Signals) -> None:
        """Signal the worker and its process group, unless it has ended."""
        if self.exit_code is None:
            self.was_told_to_stop = True
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)

    @property
    def ending(self) -> Ending:
        """How it ended, which it has."""
        assert self.exit_code is not None
        lines = tuple(self.keeper.traceback)
        return Ending(
            rank=self.rank,
            host=socket.gethostname(),
            pid=self.pid,
            exit_code=self.exit_code,
            traceback=lines,
            began_s=(self.keeper.began_s if lines else None) or self.ended_s,
            was_told_to_stop=self.was_told_to_stop,
        )

    def close(self) -> None:
        """Close what this process holds of it."""
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()
        os.close(self.death_fd)


class Workers:
    """All workers of one host, with one thread that reads their output and sees their deaths in order."""

    def __init__(self, console: Listener) -> None:
        self._console = console
        self._token = secrets.token_hex(16)
        self._guard = _start_guard(self._token)
        self._selector = selectors.DefaultSelector()
        self._reader: threading.Thread | None = None
        self._closing = threading.Event()
        self.all: list[Worker] = []

    def start(
        self, commands: Mapping[int, tuple[Sequence[str], Mapping[str, str]]], *, cwd: Path | None = None
    ) -> None:
        """Start one process per rank: rank → (command, environment); `cwd`: None for this process's."""
        self._closing.clear()
        for rank, (command, environment) in commands.items():
            worker = Worker(rank, command, {**environment, orphan_guard.VARIABLE: self._token}, cwd)
            self.all.append(worker)
            for fd in (worker.out_fd, worker.err_fd, worker.death_fd):
                self._selector.register(fd, selectors.EVENT_READ, worker)
        self._reader = threading.Thread(target=self._read, name="paceline-output", daemon=True)
        self._reader.start()

    @property
    def running(self) -> list[Worker]:
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
        """End every process of the job at once, grandchildren too, and show what they said last."""
        for worker in self.running:
            worker.signal(signal.SIGKILL)
        orphan_guard.sweep(self._token)
        self._closing.set()
        if self._reader is not None:
            self._reader.join(_DRAIN_S + 10.0)
            self._reader = None
        self._console.end_bar()

    def forget(self) -> None:
        """Drop ended workers, so that others can be started in their place."""
        for worker in self.all:
            worker.close()
        self.all = []
        self._selector.close()
        self._selector = selectors.DefaultSelector()

    def close(self) -> None:
        """End everything and dismiss the guard."""
        self.kill()
        self.forget()
        self._selector.close()
        assert self._guard.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._guard.stdin.write(orphan_guard.DISMISS)
            self._guard.stdin.close()
        self._guard.wait(10)

    def _read(self) -> None:
        """Body of the reading thread: ends when all streams have, or soon after closing began."""
        deadline: float | None = None
        while self._selector.get_map():
            holding = any(w.keeper.is_holding for w in self.all)
            for key, _ in self._selector.select(0.1 if holding or self._closing.is_set() else 0.5):
                if key.fd == key.data.death_fd:
                    self._selector.unregister(key.fd)
                    self._on_death(key.data)
                elif not self._drain(key.data, key.fd, limit=1):
                    self._selector.unregister(key.fd)
            now = time.monotonic()
            for worker in self.all:
                if worker.exit_code is None:
                    self._show(worker, worker.keeper.stale(now))
            if self._closing.is_set():
                deadline = deadline or now + _DRAIN_S
                if now > deadline:
                    return

    def _on_death(self, worker: Worker) -> None:
        for fd in (worker.out_fd, worker.err_fd):
            if fd in self._selector.get_map() and not self._drain(worker, fd, limit=1 << 10):
                self._selector.unregister(fd)
        worker.reap()
        if worker.exit_code == 0:
            self._show(worker, worker.keeper.release())

    def _drain(self, worker: Worker, fd: int, *, limit: int) -> bool:
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

    def _emit(self, worker: Worker, fd: int, lines: Iterator[tuple[str, bool]]) -> None:
        for text, is_whole in lines:
            if not is_whole:
                self._console.bar(worker.rank, text)
            elif fd == worker.err_fd:
                # torch's exception hook writes the rank too; once is enough.
                text = text.removeprefix(f"[rank{worker.rank}]: ")
                self._show(worker, worker.keeper.add(text, time.monotonic()))
            else:
                self._console.line(worker.rank, text)

    def _show(self, worker: Worker, lines: Sequence[str]) -> None:
        for line in lines:
            self._console.line(worker.rank, line, error=True)


def _start_guard(token: str) -> subprocess.Popen[bytes]:
    # Without the mark of an outer launcher: if that one ends this job, the guard must outlive it to clean up.
    environment = {k: v for k, v in os.environ.items() if k != orphan_guard.VARIABLE}
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(Path(orphan_guard.__file__)), token],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
