"""The progress bar on rank 0; quiet without a terminal."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from paceline.train.data.loader import known_length


class ProgressBar:
    """One line: epoch, batches done, time left. Does nothing unless `enabled` and on a terminal.

    `columns`: under a launcher with a terminal, the width that it offers; the bar is then a plain line that
    ends in a carriage return, which the launcher draws.
    """

    def __init__(self, *, enabled: bool, columns: int = 0) -> None:
        self.enabled = enabled and (columns > 0 or sys.stderr.isatty())
        self._columns = columns
        self._line: LineBar | None = None
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def begin(self, title: str, data: object) -> None:
        """Start the bar of one epoch over `data`, whose length may be unknown."""
        if not self.enabled:
            return
        total = known_length(data)
        self.end()
        done = getattr(data, "step", 0)
        if self._columns:
            self._line = LineBar(title, total, done, self._columns)
            return
        from rich.console import Console

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._progress.add_task(title, total=total, completed=done)
        self._progress.start()

    def advance(self) -> None:
        """One more batch is done."""
        if self._line is not None:
            self._line.advance()
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task)

    def end(self) -> None:
        """Take the bar away."""
        if self._line is not None:
            self._line.erase()
            self._line = None
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._task = None

    def print(self, *values: object, **keywords: Any) -> None:
        """Print without tearing the bar."""
        progress = self._progress
        if progress is not None:
            progress.stop()
        print(*values, **keywords)
        if progress is not None:
            progress.start()


class LineBar:
    """A bar as plain text that rewrites its own line on stderr, ten times a second at most."""

    _PERIOD_S = 0.1
    _WIDTH = 30

    def __init__(self, title: str, total: int | None, done: int, columns: int) -> None:
        self._title, self._total, self._done, self._columns = title, total, done, columns
        self._first, self._began_s, self._drawn_s = done, time.monotonic(), 0.0

    def advance(self) -> None:
        """One more batch is done."""
        self._done += 1
        now_s = time.monotonic()
        if now_s - self._drawn_s >= self._PERIOD_S:
            self._drawn_s = now_s
            self._write(self._text(now_s)[: self._columns])

    def erase(self) -> None:
        """Leave an empty line."""
        self._write("\x1b[K")

    def _text(self, now_s: float) -> str:
        if not self._total:
            return f"{self._title}  {self._done} batches"
        full = min(self._WIDTH, self._WIDTH * self._done // self._total)
        left_s = (now_s - self._began_s) / (self._done - self._first) * max(0, self._total - self._done)
        clock = f"{int(left_s) // 60}:{int(left_s) % 60:02d} left"
        bar = "━" * full + "╌" * (self._WIDTH - full)
        return f"{self._title}  {bar}  {self._done}/{self._total}  {clock}"

    def _write(self, text: str) -> None:
        sys.stderr.write(f"\r{text}\r")
        sys.stderr.flush()
