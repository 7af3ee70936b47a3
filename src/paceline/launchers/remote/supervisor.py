"""The supervisor of a worker, where the engine placed it: starts it, forwards its output, and ends it.

A supervisor lives in a process of the engine (a Ray actor, a Spark task). The worker is a process of its own,
started as on this host: the same command, environment, output and exit code. It dies with the supervisor, no
matter how that dies.
"""

from __future__ import annotations

import dataclasses
import os
import queue
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from paceline.errors import ConfigError
from paceline.launchers.processes.failure import ExitReason
from paceline.launchers.processes.worker_process import WorkerCommand
from paceline.launchers.processes.workers import Workers
from paceline.launchers.remote.events import BarEvent, Event, ExitEvent, LineEvent, ProgressEvent

if TYPE_CHECKING:
    from paceline.comm.rendezvous.store_server import StoreServer

_POLL_S = 0.05


@dataclasses.dataclass(frozen=True)
class StartCommand:
    """What a supervisor is told to run."""

    rank: int
    attempt: int
    command: tuple[str, ...]
    """Program and arguments; if `is_python`, without the program, which is the supervisor's own Python."""
    is_python: bool
    environment: dict[str, str]
    """Added to the supervisor's own."""
    directory: str | None
    """Where to run; None: the supervisor's current directory."""
    call: bytes | None
    """The content of a `FunctionCall`; the command's last word is then the path of a folder with it."""
    progress: bytes | None = None
    """What an earlier attempt kept for this one (`function_call.keep_progress`)."""


@dataclasses.dataclass(frozen=True)
class WorkerLocation:
    """Where the engine placed a supervisor and its worker."""

    host: str
    """Identifies the host: equal for supervisors on the same host."""
    name: str
    """The host's name, for people."""
    address: str
    """The host's address, as other supervisors' hosts reach it."""


class Supervisor:
    """Runs one worker at a time. Methods may be called from several threads."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._workers = Workers(_OutputQueue(self._queue))
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._rank = -1
        self._is_running = False
        self._store: StoreServer | None = None
        self._attempt = -1
        self._changing = threading.Lock()  # starting, stopping and ending exclude each other

    def open_store(self, secret: str, address: str | None) -> str:
        """Open a store in which the workers meet; returns where it listens. An earlier one is closed.

        Args:
            secret: The key of the job, in hexadecimal.
            address: This host's address for the others; None: all workers are on this host.
        """
        from paceline.comm.rendezvous.store_server import StoreServer

        if self._store is not None:
            self._store.close()
        self._store = StoreServer(bytes.fromhex(secret), host=address)
        return self._store.address

    def start(self, command: StartCommand) -> None:
        """Start the worker. Raises ConfigError if its folder or its program is not on this host."""
        if command.directory is not None and not Path(command.directory).is_dir():
            raise ConfigError(
                f"rank {command.rank}: folder {command.directory} is not on host {socket.gethostname()}:"
                " share it, or let the engine bring the code there with --ship FOLDER"
            )
        with self._changing:
            self._start(command)

    def _start(self, command: StartCommand) -> None:
        self._workers.forget()
        self._attempt = command.attempt
        words = ([sys.executable] if command.is_python else []) + list(command.command)
        if command.call is not None:
            self._folder = tempfile.TemporaryDirectory(prefix="paceline-call-")
            (Path(self._folder.name) / "call").write_bytes(command.call)
            if command.progress is not None:
                (Path(self._folder.name) / "resume").write_bytes(command.progress)
            words.append(self._folder.name)
        self._rank = command.rank
        self._is_running = True
        directory = None if command.directory is None else Path(command.directory)
        worker_command = WorkerCommand(words, {**os.environ, **command.environment})
        try:
            self._workers.start({command.rank: worker_command}, directory=directory)
        except OSError as error:
            self._is_running = False
            raise ConfigError(f"rank {command.rank}: cannot start {words[0]!r}: {error}") from None

    def events(self, wait_s: float) -> list[Event]:
        """What happened since the last call; waits up to `wait_s` seconds for something to happen."""
        deadline = time.monotonic() + wait_s
        found: list[Event] = []
        while True:
            try:
                found.append(self._queue.get(timeout=0 if found else _POLL_S))
                continue
            except queue.Empty:
                pass
            if (progress := self._take_progress()) is not None:
                found.append(ProgressEvent(progress))
            if self._is_running and all(w.exit_code is not None for w in self._workers.all):
                self._is_running = False
                with self._changing:
                    self._workers.kill()  # its children too; afterwards all its output is in the queue
                while not self._queue.empty():
                    found.append(self._queue.get())
                found.append(ExitEvent(self._exit_reason()))
            if found or time.monotonic() > deadline:
                return found

    def stop(self, grace_s: float, attempt: int) -> None:
        """SIGTERM now, SIGKILL after `grace_s` seconds; returns when the worker has ended.

        Stops only the worker of `attempt`: a call that comes late must not end the next one.
        """
        with self._changing:
            if attempt == self._attempt:
                self._workers.stop(grace_s)

    def close(self) -> None:
        """End the worker and close the store."""
        self._workers.close()
        if self._store is not None:
            self._store.close()
        if self._folder is not None:
            self._folder.cleanup()

    def _exit_reason(self) -> ExitReason:
        (worker,) = self._workers.all
        reason = worker.exit_reason
        # The age is meaningful on another host too, a time of this host's clock is not.
        age_s = time.monotonic() - reason.began_s
        result, error = self._read_output("result"), self._read_output("error")
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
        return dataclasses.replace(reason, began_s=-age_s, result=result, error=error)

    def _take_progress(self) -> bytes | None:
        """What the worker has kept for another attempt since the last call."""
        path = None if self._folder is None else Path(self._folder.name) / "progress"
        if path is None or not path.is_file():
            return None
        content = path.read_bytes()
        path.unlink()
        return content

    def _read_output(self, kind: str) -> bytes | None:
        """The file with the function's "result" or "error", if the worker wrote one."""
        if self._folder is None:
            return None
        path = Path(self._folder.name) / f"{kind}.{self._rank}"
        return path.read_bytes() if path.is_file() else None


class _OutputQueue:
    """Puts a worker's output into a queue."""

    def __init__(self, into: queue.SimpleQueue[Event]) -> None:
        self._queue = into

    def line(self, rank: int, text: str, *, error: bool = False) -> None:
        self._queue.put(LineEvent(text, error))

    def bar(self, rank: int, text: str) -> None:
        self._queue.put(BarEvent(text))

    def end_bar(self) -> None:
        """Nothing: the driver's console does this itself."""


def lost(rank: int, location: WorkerLocation, why: str) -> ExitReason:
    """The exit reason of a worker whose supervisor is gone."""
    return ExitReason(
        rank=rank,
        host=location.name,
        pid=0,
        exit_code=-signal.SIGKILL,
        began_s=time.monotonic(),
        lost=why,
    )


def local_ranks(locations: Sequence[WorkerLocation]) -> list[int]:
    """For each rank, whose location is `locations[rank]`, its place among the ranks of its host."""
    count: dict[str, int] = {}
    found = []
    for location in locations:
        found.append(count.get(location.host, 0))
        count[location.host] = found[-1] + 1
    return found
