"""Exit reasons of workers, and which of several failed workers caused the others to fail."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from paceline.errors import PacelineError, WorkerFailed, named_in, reference
from paceline.launchers.processes.console import Console

# What a worker prints when another one has gone: a consequence, hardly ever the cause.
_CONSEQUENCE = re.compile(
    r"PeerLost|Timeout|[Tt]imed out|Connection (closed|reset|refused)|Broken pipe|DistNetworkError"
    r"|DistBackendError|KeyboardInterrupt|communicator cannot be used|may not go on without"
    r"|block of job\.main_first failed on"
)


@dataclass(frozen=True)
class ExitReason:
    """How one worker process ended, on this host or on another."""

    rank: int
    host: str
    pid: int
    exit_code: int
    """As subprocess gives it: negative for a signal."""
    traceback: tuple[str, ...] = ()
    began_s: float = 0.0
    """When its traceback began, else when it ended; the same clock for all workers that are compared."""
    was_told_to_stop: bool = False
    lost: str = ""
    """Why its end was not observed, e.g. because its host is gone."""
    result: bytes | None = None
    """What its function returned under `launch`, pickled."""
    error: bytes | None = None
    """What its function raised under `launch`, pickled."""

    @property
    def has_failed(self) -> bool:
        """Whether it failed, rather than ended because the launcher stopped it."""
        if not self.exit_code:
            return False
        if self.was_told_to_stop and self.exit_code in (-signal.SIGTERM, -signal.SIGKILL):
            return bool(self.traceback)
        return True


@dataclass(frozen=True)
class JobFailure:
    """The first failure of a job, and the failures that followed from it."""

    rank: int
    world_size: int
    host: str
    pid: int
    exit_code: int
    """As subprocess gives it: negative for a signal."""
    traceback: tuple[str, ...]
    followers: tuple[str, ...]
    """One line for each other worker that failed too."""
    lost: str = ""
    """See `ExitReason.lost`."""

    @property
    def shell_code(self) -> int:
        """The launcher's exit code: the worker's, or 128 + the signal's number."""
        return 128 - self.exit_code if self.exit_code < 0 else self.exit_code

    @property
    def headline(self) -> str:
        """One sentence: which rank failed, where, and how."""
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
        """The line of the traceback that names the exception, or ""."""
        return error_line(self.traceback)

    def show(self, console: Console) -> None:
        """Print the consequences first, and the cause last."""
        for line in self.followers:
            console.note(line)
        more = "" if (kind := self._kind) is None else f" {reference(kind)}"
        console.note(self.headline + ("" if self.traceback else more))
        for line in self.traceback[:-1]:
            console.line(self.rank, line, error=True)
        for line in self.traceback[-1:]:
            console.line(self.rank, line + more, error=True)

    @property
    def _kind(self) -> type[PacelineError] | None:
        """The class that explains this failure: the error's own, or that of workers which were ended."""
        if self.traceback:
            return named_in(self.error_line)
        return WorkerFailed if self.lost or self.exit_code < 0 else None


def first_failure(exit_reasons: Sequence[ExitReason], world_size: int) -> JobFailure | None:
    """Return the failure that most likely caused the others; None if no worker failed.

    Each worker's failure is dated by the start of its traceback, else by its death. Errors about lost peers
    come after all other errors, whatever their date.
    """
    failed = [reason for reason in exit_reasons if reason.has_failed]
    if not failed:
        return None
    cause, *others = sorted(failed, key=_order)
    return JobFailure(
        rank=cause.rank,
        world_size=world_size,
        host=cause.host,
        pid=cause.pid,
        exit_code=cause.exit_code or 1,
        traceback=cause.traceback,
        followers=tuple(_follower(reason) for reason in sorted(others, key=lambda r: r.rank)),
        lost=cause.lost,
    )


def error_line(traceback: Sequence[str]) -> str:
    """The line of a traceback that names the exception: of the last block, the first line not indented."""
    found, in_frames = "", False
    for line in traceback:
        if line.startswith("Traceback (most recent call last):"):
            in_frames = True
        elif in_frames and line and not line[0].isspace():
            found, in_frames = line, False
    return found or (traceback[0] if traceback else "")


def _order(reason: ExitReason) -> tuple[bool, float, int]:
    error = error_line(reason.traceback)
    # The launcher's own signal may have ended it while it was still printing.
    is_cut = reason.was_told_to_stop and error.startswith("Traceback (most recent call last)")
    return is_cut or bool(_CONSEQUENCE.search(error)), reason.began_s, reason.rank


def _follower(reason: ExitReason) -> str:
    error = error_line(reason.traceback)
    if reason.exit_code < 0:
        end = f"ended by {signal.Signals(-reason.exit_code).name}"
    else:
        end = f"exit code {reason.exit_code}"
    return f"rank {reason.rank} failed after it ({reason.lost or end})" + (f": {error}" if error else "")
