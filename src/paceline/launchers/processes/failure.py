"""Which worker failed first, and how to say it."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from paceline.launchers.processes.console import Console

# What a worker says when another one has gone: a consequence, hardly ever the cause.
_CONSEQUENCE = re.compile(
    r"PeerLost|Timeout|[Tt]imed out|Connection (closed|reset|refused)|Broken pipe|DistNetworkError"
    r"|DistBackendError|KeyboardInterrupt"
)


@dataclass(frozen=True)
class Ending:
    """How one worker ended, here or on another host."""

    rank: int
    host: str
    pid: int
    exit_code: int
    """As of subprocess: negative for a signal."""
    traceback: tuple[str, ...] = ()
    began_s: float = 0.0
    """When its traceback began, else when it ended; the same clock for all workers that are compared."""
    was_told_to_stop: bool = False
    lost: str = ""
    """Why nobody could see it end, e.g. that its host is gone."""
    result: bytes | None = None
    """What it left for `launch`, pickled."""
    error: bytes | None = None

    @property
    def has_failed(self) -> bool:
        """Whether it ended badly, and not because the launcher wanted it."""
        if not self.exit_code:
            return False
        if self.was_told_to_stop and self.exit_code in (-signal.SIGTERM, -signal.SIGKILL):
            return bool(self.traceback)
        return True


@dataclass(frozen=True)
class Failure:
    """The first failure of a job, and what followed from it."""

    rank: int
    world_size: int
    host: str
    pid: int
    exit_code: int
    """As of subprocess: negative for a signal."""
    traceback: tuple[str, ...]
    followers: tuple[str, ...]
    """One line for each other worker that failed too."""
    lost: str = ""
    """See `Ending.lost`."""

    @property
    def shell_code(self) -> int:
        """The launcher's exit code: the worker's, or 128 + the signal's number."""
        return 128 - self.exit_code if self.exit_code < 0 else self.exit_code

    @property
    def headline(self) -> str:
        """One sentence: who, where, how."""
        who = f"rank {self.rank} of {self.world_size} (host {self.host}, pid {self.pid})"
        if self.lost:
            return f"{who} was lost: {self.lost}"
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


def first_failure(endings: Sequence[Ending], world_size: int) -> Failure | None:
    """Return the failure that most likely caused the others; None if no worker failed.

    Each worker's failure is dated by the start of its traceback, else by its death. Complaints about lost
    peers come after everything else, whatever their date.
    """
    failed = [e for e in endings if e.has_failed]
    if not failed:
        return None
    cause, *others = sorted(failed, key=_order)
    return Failure(
        rank=cause.rank,
        world_size=world_size,
        host=cause.host,
        pid=cause.pid,
        exit_code=cause.exit_code or 1,
        traceback=cause.traceback,
        followers=tuple(_follower(e) for e in sorted(others, key=lambda e: e.rank)),
        lost=cause.lost,
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


def _order(ending: Ending) -> tuple[bool, float, int]:
    return bool(_CONSEQUENCE.search(error_line(ending.traceback))), ending.began_s, ending.rank


def _follower(ending: Ending) -> str:
    said, code = error_line(ending.traceback), ending.exit_code
    end = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"rank {ending.rank} failed after it ({ending.lost or end})" + (f": {said}" if said else "")
