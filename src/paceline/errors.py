"""The exception tree. Every message says who, what, where, expected, got, and the next move.

    PacelineError
    ├── ConfigError        the user's input: a strategy string, an option, a task file, a data path
    ├── ScheduleError      a collective program that is not correct, with rank, op, chunk and reason
    ├── WorkerFailed       a worker of `launch` raised or died; carries its rank and traceback
    ├── CheckpointError    a checkpoint that cannot be written, read, or does not fit the job
    └── CommError          communication
        ├── PeerLost       a rank died or its connection broke; names it
        ├── Timeout        nothing arrived before the deadline; names the rank waited for
        ├── Mismatch       ranks disagree about the operation, its size, dtype or order
        └── ProtocolError  bytes that are not ours: authentication, framing or validation failed

`ConfigError` is also a `ValueError`, `CommError` a `RuntimeError` (what torch.distributed raises) and
`Timeout` a `TimeoutError`, so callers that know only the standard names catch them. `assert` is kept for
Paceline's own bugs. Every class has a code and a section in `errors.md`; `paceline errors PL03` prints it.
A message ends with `reference`, but only where it ends a command or a worker.
"""

from __future__ import annotations

import re
from typing import ClassVar


class PacelineError(Exception):
    """Base of every error that Paceline raises on purpose."""

    code: ClassVar[str] = "PL00"
    """Its section of `errors.md`; classes outside this file have that of their base."""


class ConfigError(PacelineError, ValueError):
    """The user's input is wrong; raised before any work starts."""

    code = "PL01"


class ScheduleError(PacelineError):
    """A collective program is not correct or cannot be lowered."""

    code = "PL02"


class WorkerFailed(PacelineError):
    """A worker started by `launch` raised an exception or died; the message has its rank and traceback."""

    code = "PL07"


class CheckpointError(PacelineError):
    """A checkpoint cannot be written, read, or does not fit this job."""

    code = "PL08"


class CommError(PacelineError, RuntimeError):
    """Communication failed; the communicator that raised it must not be used again."""

    code = "PL09"


class PeerLost(CommError):
    """A peer died or its connection broke."""

    code = "PL03"


class Timeout(CommError, TimeoutError):
    """A peer did not answer before the deadline."""

    code = "PL04"


class Mismatch(CommError):
    """Ranks called different operations, or the same one with different sizes or dtypes."""

    code = "PL05"


class ProtocolError(CommError):
    """Bytes from a peer failed authentication, framing or validation."""

    code = "PL06"


class RunLengthWarning(UserWarning):
    """A strategy's arguments do not suit the length of the run; it names the number to change."""

    code: ClassVar[str] = "PL10"


def reference(kind: type[PacelineError]) -> str:
    """The last words of a message that ends a command or a worker: where its class is explained."""
    return f"(more: paceline errors {kind.code})"


def named_in(line: str) -> type[PacelineError] | None:
    """The class whose name begins `line`, the last line of a traceback; None for errors of others."""
    name = re.match(rf"{__name__}\.(\w+)\b", line)
    found = globals().get(name[1]) if name is not None else None
    return found if isinstance(found, type) and issubclass(found, PacelineError) else None
