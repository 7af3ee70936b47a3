"""Where the engine put a worker: a keeper that starts it, passes on what it says, and ends it.

A keeper lives in a process of the engine (a Ray actor, a Spark task). The worker is a process of its own,
started as on this host: the same command, environment, output, exit code and end. It dies with the keeper,
however that dies.
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
from typing import Any

from paceline.errors import ConfigError
from paceline.launchers.processes.failure import Ending
from paceline.launchers.processes.workers import Workers

LINE, BAR, PROGRESS, END = "line", "bar", "progress", "end"
Event = tuple[str, Any]
"""(LINE, (text, whether it is of standard error)), (BAR, text), (PROGRESS, bytes) or (END, Ending)."""

_POLL_S = 0.05


@dataclasses.dataclass(frozen=True)
class Order:
    """What a keeper is told to run."""

    rank: int
    attempt: int
    command: tuple[str, ...]
    """Without its first word if `is_python`: that is the keeper's own Python."""
    is_python: bool
    environment: dict[str, str]
    """Added to the keeper's own."""
    directory: str | None
    """Where to run; None: the keeper's current directory."""
    call: bytes | None
    """The content of a `Call`; its folder's path is then the command's last word."""
    progress: bytes | None = None
    """What the attempt before left for the next one (`call.keep_progress`)."""


@dataclasses.dataclass(frozen=True)
class Member:
    """Where a keeper is."""

    host: str
    """Equal for keepers on the same host."""
    name: str
    """The host's, for people."""
    address: str
    """At which the other keepers' hosts reach it."""


class Keeper:
    """One worker at a time. Methods may be called from several threads."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._workers = Workers(_Relay(self._queue))
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._rank = -1
        self._is_running = False
        self._store: Any = None
        self._attempt = -1
        self._changing = threading.Lock()  # starting, stopping and ending exclude each other

    def open_store(self) -> int:
        """Open a store in which the workers meet; returns its port. The one before is closed."""
        from torch._C._distributed_c10d import TCPStore

        self._store = None
        self._store = TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False)
        return int(self._store.port)

    def start(self, order: Order) -> None:
        """Start the worker. Raises ConfigError if its folder is not on this host."""
        if order.directory is not None and not Path(order.directory).is_dir():
            raise ConfigError(
                f"rank {order.rank}: folder {order.directory} is not on host {socket.gethostname()}: share"
                " it, or let the engine bring the code there with --ship FOLDER"
            )
        with self._changing:
            self._start(order)

    def _start(self, order: Order) -> None:
        self._workers.forget()
        self._attempt = order.attempt
        command = ([sys.executable] if order.is_python else []) + list(order.command)
        if order.call is not None:
            self._folder = tempfile.TemporaryDirectory(prefix="paceline-call-")
            (Path(self._folder.name) / "call").write_bytes(order.call)
            if order.progress is not None:
                (Path(self._folder.name) / "resume").write_bytes(order.progress)
            command.append(self._folder.name)
        self._rank, self._is_running = order.rank, True
        environment = {**os.environ, **order.environment}
        cwd = None if order.directory is None else Path(order.directory)
        try:
            self._workers.start({order.rank: (command, environment)}, cwd=cwd)
        except OSError as error:
            self._is_running = False
            raise ConfigError(f"rank {order.rank}: cannot start {command[0]!r}: {error}") from None

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
            if (progress := self._progress()) is not None:
                found.append((PROGRESS, progress))
            if self._is_running and all(w.exit_code is not None for w in self._workers.all):
                self._is_running = False
                with self._changing:
                    self._workers.kill()  # its children too; and its last words are in the queue now
                while not self._queue.empty():
                    found.append(self._queue.get())
                found.append((END, self._ending()))
            if found or time.monotonic() > deadline:
                return found

    def stop(self, grace_s: float, attempt: int) -> None:
        """SIGTERM now, SIGKILL after `grace_s` seconds; returns when the worker has ended.

        Only the worker of that attempt: a call that comes late must not end the next one.
        """
        with self._changing:
            if attempt == self._attempt:
                self._workers.stop(grace_s)

    def close(self) -> None:
        """End everything."""
        self._workers.close()
        self._store = None
        if self._folder is not None:
            self._folder.cleanup()

    def _ending(self) -> Ending:
        (worker,) = self._workers.all
        ending = worker.ending
        # Dated by its age, which means something on another host too.
        age_s = time.monotonic() - ending.began_s
        result, error = self._left("result"), self._left("error")
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
        return dataclasses.replace(ending, began_s=-age_s, result=result, error=error)

    def _progress(self) -> bytes | None:
        """What the worker keeps for another attempt, once."""
        path = None if self._folder is None else Path(self._folder.name) / "progress"
        if path is None or not path.is_file():
            return None
        content = path.read_bytes()
        path.unlink()
        return content

    def _left(self, kind: str) -> bytes | None:
        if self._folder is None:
            return None
        path = Path(self._folder.name) / f"{kind}.{self._rank}"
        return path.read_bytes() if path.is_file() else None


class _Relay:
    """Hears one worker and queues what it says."""

    def __init__(self, into: queue.SimpleQueue[Event]) -> None:
        self._queue = into

    def line(self, rank: int, text: str, *, error: bool = False) -> None:
        """Pass on a line."""
        self._queue.put((LINE, (text, error)))

    def bar(self, rank: int, text: str) -> None:
        """Pass on a progress line."""
        self._queue.put((BAR, text))

    def end_bar(self) -> None:
        """The launcher's console does this itself."""


def lost(rank: int, member: Member, why: str) -> Ending:
    """The end of a worker whose keeper is gone."""
    return Ending(
        rank=rank, host=member.name, pid=0, exit_code=-signal.SIGKILL, began_s=time.monotonic(), lost=why
    )


def local_ranks(members: Sequence[Member]) -> list[int]:
    """members[r] is rank r's; returns each rank's place among those of its host."""
    seen: dict[str, int] = {}
    found = []
    for member in members:
        found.append(seen.get(member.host, 0))
        seen[member.host] = found[-1] + 1
    return found
