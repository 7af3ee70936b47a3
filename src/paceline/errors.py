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
Paceline's own bugs.
"""

from __future__ import annotations


class PacelineError(Exception):
    """Base of every error that Paceline raises on purpose."""


class ConfigError(PacelineError, ValueError):
    """The user's input is wrong; raised before any work starts."""


class ScheduleError(PacelineError):
    """A collective program is not correct or cannot be lowered."""


class WorkerFailed(PacelineError):
    """A worker started by `launch` raised an exception or died; the message has its rank and traceback."""


class CheckpointError(PacelineError):
    """A checkpoint cannot be written, read, or does not fit this job."""


class CommError(PacelineError, RuntimeError):
    """Communication failed; the communicator that raised it must not be used again."""


class PeerLost(CommError):
    """A peer died or its connection broke."""


class Timeout(CommError, TimeoutError):
    """A peer did not answer before the deadline."""


class Mismatch(CommError):
    """Ranks called different operations, or the same one with different sizes or dtypes."""


class ProtocolError(CommError):
    """Bytes from a peer failed authentication, framing or validation."""
