"""A limit for leaving a job: a worker that hangs there would keep its launcher, and its machine, for ever."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import traceback
from collections.abc import Iterator

from paceline.comm.rendezvous.meeting import Meeting

_EXIT_CODE = 70  # EX_SOFTWARE of sysexits.h
_MARGIN_S = 5.0  # what waits for the deadline itself has failed by then


@contextlib.contextmanager
def limited_exit(meeting: Meeting | None) -> Iterator[contextlib.ExitStack]:
    """An ExitStack; the process ends if its callbacks take longer than the job's deadline.

    Args:
        meeting: Of the job; None in simulations, which are not limited.
    """
    is_over = threading.Event()
    if meeting is not None and meeting.size > 1:
        limit_s = meeting.timeout_s + _MARGIN_S
        arguments = (is_over, limit_s, meeting.rank, threading.get_ident())
        threading.Thread(target=_end_when_late, args=arguments, name="paceline-leaving", daemon=True).start()
    try:
        with contextlib.ExitStack() as stack:
            yield stack
    finally:
        is_over.set()


def _end_when_late(is_over: threading.Event, limit_s: float, rank: int, thread: int) -> None:
    if is_over.wait(limit_s):
        return
    frame = sys._current_frames().get(thread)  # noqa: SLF001  Python's only way to see another thread
    where = "".join(traceback.format_stack(frame)) if frame is not None else ""
    # In the form of a traceback, so that launchers show it as the reason.
    sys.stderr.write(
        f"Traceback (most recent call last):\n{where}"
        f"paceline.errors.CommError: rank {rank} hangs while it leaves the job: after {limit_s:g} s it is at"
        " the line above; its process ends now\n"
    )
    sys.stderr.flush()
    os._exit(_EXIT_CODE)
