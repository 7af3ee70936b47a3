"""The communicator that this thread was given, if any: what `paceline.init()` finds in a simulation."""

from __future__ import annotations

import threading
from typing import Any

_local = threading.local()


def provide(communicator: Any) -> None:
    """Give this thread a communicator (None takes it back)."""
    _local.communicator = communicator


def provided() -> Any:
    """Return what this thread was given, or None."""
    return getattr(_local, "communicator", None)
