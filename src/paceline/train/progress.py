"""The progress bar on rank 0; quiet without a terminal."""

from __future__ import annotations

import sys
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class ProgressBar:
    """One line: epoch, batches done, speed. Does nothing unless `enabled` and stderr is a terminal."""

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled and sys.stderr.isatty()
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def begin(self, title: str, data: Any) -> None:
        """Start the bar of one epoch over `data`, whose length may be unknown."""
        if not self.enabled:
            return
        total = len(data) if hasattr(data, "__len__") else None
        from rich.console import Console

        self.end()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._progress.add_task(title, total=total, completed=getattr(data, "step", 0))
        self._progress.start()

    def advance(self) -> None:
        """One batch more."""
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task)

    def end(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._task = None

    def print(self, *values: Any, **keywords: Any) -> None:
        """Print without tearing the bar."""
        progress = self._progress
        if progress is not None:
            progress.stop()
        print(*values, **keywords)
        if progress is not None:
            progress.start()
