"""A worker's output stream, cut into lines; its last traceback is held back, to be shown at the end."""

from __future__ import annotations

import re
from collections.abc import Iterator

_MAX_LINE_BYTES = 1 << 16
_MAX_HELD_LINES = 2000
_BEGINS = re.compile(
    r"Traceback \(most recent call last\):|  \+ Exception Group Traceback"
    r"|Fatal Python error: |terminate called "
)
# torch's C++ logger prints while the interpreter shuts down, after the traceback and not as part of it.
_LOGGER = re.compile(r"\[(rank\d+\]:\[)?[WIEF]\d{4} ")


class LineReader:
    """Cuts bytes into lines. A carriage return restarts the line, as on a terminal."""

    def __init__(self) -> None:
        self._pending = b""

    def feed(self, data: bytes) -> Iterator[tuple[str, bool]]:
        """Yield (text, True) for each line that ended, and (text, False) for one being rewritten."""
        *lines, pending = (self._pending + data).split(b"\n")
        for line in lines:
            yield _visible(line), True
        head, returned, tail = pending.rpartition(b"\r")
        if returned:
            yield _visible(head + b"\r" + tail), False
            # Kept with its return, so that the next text replaces all of it.
            shown = _visible(head + b"\r" + tail)
            pending = b"\r" + shown.encode() if shown else b""
        if len(pending) > _MAX_LINE_BYTES:
            yield _visible(pending), True
            pending = b""
        self._pending = pending

    def finish(self) -> Iterator[tuple[str, bool]]:
        """Yield the unfinished last line, if there is one."""
        pending, self._pending = self._pending, b""
        if text := _visible(pending):
            yield text, True


def _visible(line: bytes) -> str:
    """What a terminal would show of a line with carriage returns: the last text, unless it was erased."""
    text = b""
    for part in line.split(b"\r"):
        before, erased, after = part.rpartition(b"\x1b[K")
        text = after if erased else (before + after or text)
    return text.decode("utf-8", "replace")


class TracebackKeeper:
    """Holds back a traceback at the end of a stream, so that it can be shown last, and once.

    If the process lives on for three seconds, the program caught the error and printed the traceback itself:
    the lines are released as ordinary output, and remembered in case the process dies of the error later.
    """

    PATIENCE_S = 3.0

    def __init__(self) -> None:
        self.began_s: float | None = None
        """When the traceback that is held, or was released last, began."""
        self._held: list[str] = []
        self._last: list[str] = []
        self._fed_s = 0.0

    def add(self, line: str, now_s: float) -> list[str]:
        """Take one line; return the lines to show now."""
        if not self._held:
            if not _BEGINS.match(line):
                self._last = []
                return [line]
            self.began_s = now_s
        elif _LOGGER.match(line):
            return [line]
        self._held.append(line)
        self._fed_s = now_s
        return self.release() if len(self._held) > _MAX_HELD_LINES else []

    def stale(self, now_s: float) -> list[str]:
        """Return the held lines if nothing followed them for PATIENCE_S, else nothing."""
        return self.release() if self._held and now_s - self._fed_s > self.PATIENCE_S else []

    def release(self) -> list[str]:
        """Stop holding; return the lines to show."""
        self._last, self._held = self._held, []
        return self._last

    @property
    def is_holding(self) -> bool:
        """Whether lines are held back."""
        return bool(self._held)

    @property
    def traceback(self) -> list[str]:
        """The lines of the traceback that ends the stream; empty if none does."""
        return self._held or self._last
