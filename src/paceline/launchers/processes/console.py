"""What the user sees: whole lines from many workers, each with its rank in front.

On a terminal the ranks are coloured, and an unfinished line that ends in a carriage return (a progress
bar) stays at the bottom while other lines scroll above it.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
from typing import TextIO

_COLOURS = (36, 33, 32, 35, 34, 96, 93, 92, 95, 94)
_CLEAR = "\r\x1b[K"


def wants_colour(stream: TextIO) -> bool:
    """Whether to colour what goes to `stream` (https://no-color.org, FORCE_COLOR)."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or _is_terminal(stream)


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except ValueError:  # closed
        return False


class Console:
    """Writes lines to the launcher's own standard output and error. Safe to use from several threads."""

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self._out = out or sys.stdout
        self._err = err or sys.stderr
        self._lock = threading.Lock()
        self._bar = ""
        self._draws_bars = _is_terminal(self._err)

    def line(self, rank: int, text: str, *, error: bool = False) -> None:
        """One whole line of worker `rank`."""
        stream = self._err if error else self._out
        self._write(stream, f"{self._prefix(rank, stream)}{text}\n")

    def bar(self, rank: int, text: str) -> None:
        """The line that worker `rank` rewrites, e.g. a progress bar; shown on a terminal only."""
        if self._draws_bars:
            with self._lock:
                self._bar = f"{self._prefix(rank, self._err)}{text}" if text.strip() else ""
                self._put(self._err, f"{_CLEAR}{self._bar}")

    @property
    def bar_columns(self) -> int:
        """Width of a worker's progress bar in columns; 0 without a terminal."""
        return max(20, shutil.get_terminal_size().columns - 8) if self._draws_bars else 0

    def note(self, text: str) -> None:
        """A line of the launcher itself."""
        bold = ("\x1b[1m", "\x1b[0m") if wants_colour(self._err) else ("", "")
        self._write(self._err, f"{bold[0]}paceline: {text}{bold[1]}\n")

    def end_bar(self) -> None:
        """Remove an unfinished progress line."""
        with self._lock:
            if self._bar:
                self._bar = ""
                self._put(self._err, _CLEAR)

    def _prefix(self, rank: int, stream: TextIO) -> str:
        if wants_colour(stream):
            return f"\x1b[{_COLOURS[rank % len(_COLOURS)]}m[{rank}]\x1b[0m "
        return f"[{rank}] "

    def _write(self, stream: TextIO, text: str) -> None:
        with self._lock:
            if self._bar:
                self._put(self._err, _CLEAR)
            self._put(stream, text)
            if self._bar:
                self._put(self._err, self._bar)

    def _put(self, stream: TextIO, text: str) -> None:
        try:
            stream.write(text)
            stream.flush()
        except UnicodeEncodeError:
            encoding = stream.encoding or "ascii"
            stream.write(text.encode(encoding, "replace").decode(encoding))
        except (OSError, ValueError):
            pass  # the reader has gone (`| head`): the job continues
