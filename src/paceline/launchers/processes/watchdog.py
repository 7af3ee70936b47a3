"""Ends every process of a job when its launcher is gone, however the launcher died.

Runs as a separate process by file path (`python -I -S watchdog.py TOKEN`), with the standard library only, so
it starts in milliseconds and survives a SIGKILL of the launcher. Every process of a job carries the job's
token in its environment. Children and grandchildren inherit it, also those that left the session.
"""

from __future__ import annotations

import os
import signal
import sys
import time

VARIABLE = "PACELINE_LAUNCHER"
"""The environment variable that marks the processes of one launcher."""
DISMISS = b"."
"""Written to the watchdog's standard input when the launcher has ended its processes itself."""


def marked(token: str) -> list[int]:
    """Process ids on this host whose environment carries `token`, except this process and zombies."""
    needle = f"{VARIABLE}={token}".encode()
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            with open(f"/proc/{name}/environ", "rb") as file:
                if needle in file.read().split(b"\0"):
                    found.append(int(name))
        except OSError:
            continue  # it has ended meanwhile, or belongs to another user
    return found


def kill_marked(token: str, *, timeout_s: float = 10.0) -> list[int]:
    """SIGKILL every process marked with `token`; returns those that did not die in time.

    Looks twice after the last one was seen, because a process may be starting another at this moment.
    """
    deadline = time.monotonic() + timeout_s
    empty_looks = 0
    while empty_looks < 2:
        left = marked(token)
        empty_looks = 0 if left else empty_looks + 1
        if time.monotonic() > deadline:
            return left
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        if empty_looks < 2:
            time.sleep(0.02)
    return []


def main(token: str) -> None:
    """Wait until the launcher dismisses this process or disappears; then end the launcher's processes."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if os.read(0, 1) != DISMISS:
        kill_marked(token)


if __name__ == "__main__":
    main(sys.argv[1])
