"""Which worker failed first, and how to say it."""

from __future__ import annotations

import re
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from paceline.launchers.console import Console
from paceline.launchers.workers import Worker

# What a worker says when another one has gone: a consequence, hardly ever the cause.
_CONSEQUENCE = re.compile(
    r"PeerLost|Timeout|[Tt]imed out|Connection (closed|reset|refused)|Broken pipe|DistNetworkError"
    r"|DistBackendError|KeyboardInterrupt"
)


@dataclass(frozen=True)
class Failure:
    """The first failure of a job on this host, and what followed from it."""

    rank: int
    world_size: int
    pid: int
    exit_code: int
    """As of subprocess: negative for a signal."""
    traceback: tuple[str, ...]
    followers: tuple[str, ...]
    """One line for each other worker that failed too."""

    @property
    def shell_code(self) -> int:
        """The launcher's exit code: the worker's, or 128 + the signal's number."""
        return 128 - self.exit_code if self.exit_code < 0 else self.exit_code

    @property
    def headline(self) -> str:
        """One sentence: who, where, how."""
        who = f"rank {self.rank} of {self.world_size} (host {socket.gethostname()}, pid {self.pid})"
        if self.exit_code >= 0:
            end = f"failed with exit code {self.exit_code}"
            return f"{who} {end}:" if self.traceback else f"{who} {end} and left no traceback"
        name = signal.Signals(-self.exit_code).name
        if name == "SIGKILL":
            return f"{who} was killed by SIGKILL: by hand, or for lack of memory (see `dmesg`)"
        return f"{who} was ended by {name}" + (":" if self.traceback else "")

    @property
    def error_line(self) -> str:
        """The exception's own line of the traceback, or ""."""
        return error_line(self.traceback)

    def show(self, console: Console) -> None:
        """Print what followed first, and the cause last."""
        for line in self.followers:
            console.note(line)
        console.note(self.headline)
        for line in self.traceback:
            console.line(self.rank, line, error=True)


def first_failure(workers: Sequence[Worker], world_size: int) -> Failure | None:
    """Return the failure that most likely caused the others; None if no worker failed.

    Each worker's failure is dated by the start of its traceback, else by its death. Complaints about lost
    peers come after everything else, whatever their date.
    """
    failed = [w for w in workers if _has_failed(w)]
    if not failed:
        return None
    cause, *others = sorted(failed, key=_order)
    return Failure(
        rank=cause.rank,
        world_size=world_size,
        pid=cause.pid,
        exit_code=cause.exit_code or 1,
        traceback=tuple(cause.keeper.traceback),
        followers=tuple(_follower(w) for w in sorted(others, key=lambda w: w.rank)),
    )


def error_line(traceback: Sequence[str]) -> str:
    """The line of a traceback that names the exception: the first one not indented, of the last block."""
    found, in_frames = "", False
    for line in traceback:
        if line.startswith("Traceback (most recent call last):"):
            in_frames = True
        elif in_frames and line and not line[0].isspace():
            found, in_frames = line, False
    return found or (traceback[0] if traceback else "")


def _has_failed(worker: Worker) -> bool:
    if not worker.exit_code:
        return False
    if worker.was_told_to_stop and worker.exit_code in (-signal.SIGTERM, -signal.SIGKILL):
        return bool(worker.keeper.traceback)
    return True


def _order(worker: Worker) -> tuple[bool, float, int]:
    lines = worker.keeper.traceback
    began_s = worker.keeper.began_s if lines else None
    return bool(_CONSEQUENCE.search(error_line(lines))), began_s or worker.ended_s, worker.rank


def _follower(worker: Worker) -> str:
    said = error_line(worker.keeper.traceback)
    code = worker.exit_code or 0
    end = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"rank {worker.rank} failed after it ({end})" + (f": {said}" if said else "")
