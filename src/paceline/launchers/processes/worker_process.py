"""One worker process: started here, with its output streams and its exit reason."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from paceline.launchers.processes.failure import ExitReason
from paceline.launchers.processes.output import LineReader, TracebackKeeper


@dataclass(frozen=True)
class WorkerCommand:
    """What one worker executes."""

    words: Sequence[str]
    """Program and arguments."""
    environment: Mapping[str, str]
    """Its whole environment."""


class WorkerProcess:
    """A worker as a child of this process: its rank, its streams, how it ended."""

    def __init__(self, rank: int, command: WorkerCommand, directory: Path | None = None) -> None:
        # Its own session: a Ctrl-C at the terminal reaches the launcher alone, which then stops the workers
        # in order; and one signal reaches the worker's whole process group.
        self._process = subprocess.Popen(
            command.words,
            env=dict(command.environment),
            cwd=directory,
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
        self.traceback_keeper = TracebackKeeper()
        self.exit_code: int | None = None
        """As subprocess gives it: negative for a signal; None while running."""
        self.ended_s = 0.0
        self.was_told_to_stop = False
        self._given_up = ""
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
            _signal_group(self.pid, number)

    def give_up(self, why: str) -> None:
        """Kill the worker, because the job goes on without it, or cannot go on with it."""
        self._given_up = why
        if self.exit_code is None:
            _signal_group(self.pid, signal.SIGKILL)

    @property
    def exit_reason(self) -> ExitReason:
        """How the worker ended. Only after it has been reaped."""
        assert self.exit_code is not None
        lines = tuple(self.traceback_keeper.traceback)
        return ExitReason(
            rank=self.rank,
            host=socket.gethostname(),
            pid=self.pid,
            exit_code=self.exit_code,
            traceback=lines,
            began_s=(self.traceback_keeper.began_s if lines else None) or self.ended_s,
            was_told_to_stop=self.was_told_to_stop,
            lost=self._given_up,
        )

    def close(self) -> None:
        """Close this process's ends of the worker's streams."""
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()
        os.close(self.death_fd)


def _signal_group(pid: int, number: signal.Signals) -> None:
    """Signal the process group of `pid`, if it is still there."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)
