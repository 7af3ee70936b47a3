"""The communicator that this thread was given, if any: what `paceline.init()` finds in a simulation."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

_local = threading.local()


def provide(communicator: Any) -> None:
    """Give this thread a communicator (None takes it back, and ends what was to end with it)."""
    _local.communicator = communicator
    ends, _local.ends = getattr(_local, "ends", []), []
    for end in ends:
        end()


def at_end(end: Callable[[], None]) -> None:
    """Call `end` when this thread's communicator is taken back: nothing of a simulation stays behind."""
    _local.ends.append(end)


def provided() -> Any:
    """Return what this thread was given, or None."""
    return getattr(_local, "communicator", None)
