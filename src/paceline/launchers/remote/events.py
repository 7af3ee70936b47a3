"""What supervisors report to the driver."""

from __future__ import annotations

from dataclasses import dataclass

from paceline.launchers.processes.failure import ExitReason


@dataclass(frozen=True)
class LineEvent:
    """The worker printed a line."""

    text: str
    is_error: bool
    """Whether it went to standard error."""


@dataclass(frozen=True)
class BarEvent:
    """The worker rewrote an unfinished line, e.g. a progress bar."""

    text: str


@dataclass(frozen=True)
class ProgressEvent:
    """The worker kept something for the next attempt (`function_call.keep_progress`)."""

    content: bytes


@dataclass(frozen=True)
class ExitEvent:
    """The worker ended."""

    reason: ExitReason
    """Its `began_s` is relative to now, so never above 0: clocks of two hosts cannot be compared."""


@dataclass(frozen=True)
class LostEvent:
    """The supervisor is gone, and its worker with it. The last event of a supervisor."""

    why: str


Event = LineEvent | BarEvent | ProgressEvent | ExitEvent | LostEvent
