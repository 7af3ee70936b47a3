"""How a job ended."""

from __future__ import annotations

from dataclasses import dataclass
from signal import Signals

from paceline.launchers.processes.failure import JobFailure


@dataclass(frozen=True)
class Outcome:
    """How a job ended. What the function of `JobSpec.call` returned or raised is in the call's folder."""

    exit_code: int
    failure: JobFailure | None = None
    signal: Signals | None = None
    """The signal that the launcher received, if that is why the job ended."""
    lost: frozenset[int] = frozenset()
    """Ranks that died while the job continued without them."""

    @classmethod
    def stopped_by(cls, number: Signals) -> Outcome:
        """The outcome of a job whose launcher received signal `number`; exit code as a shell gives it."""
        return cls(128 + number, signal=number)
