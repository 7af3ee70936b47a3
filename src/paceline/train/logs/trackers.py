"""Trackers of the user's: they get every row of the log, and never end a training."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Protocol

from paceline.errors import ConfigError


class Tracker(Protocol):
    """What `job.track` takes."""

    def log(self, row: dict[str, Any], step: int) -> object: ...
    def finish(self) -> object: ...


class Trackers:
    """Rank 0's trackers.

    Args:
        is_main: Whether this is rank 0; the others have none.
    """

    def __init__(self, *, is_main: bool) -> None:
        self._is_main = is_main
        self._all: list[Tracker] = []
        self._failed: set[int] = set()

    def add(self, tracker: Tracker) -> None:
        """One more; ConfigError for something without its methods."""
        missing = [n for n in ("log", "finish") if not callable(getattr(tracker, n, None))]
        if missing:
            raise ConfigError(
                f"job.track({type(tracker).__name__}): an object with log(row, step) and finish() expected,"
                f" it has no {' and no '.join(missing)}; wrap it in a class that has"
            )
        if self._is_main and not any(tracker is known for known in self._all):
            self._all.append(tracker)

    def log(self, row: dict[str, Any], step: int) -> None:
        """Every tracker gets a row of its own."""
        for tracker in self._all:
            self._call(tracker, "log", lambda one=tracker: one.log(dict(row), step))  # type: ignore[misc]

    def finish(self) -> None:
        """The last call of each."""
        trackers, self._all = self._all, []
        for tracker in trackers:
            self._call(tracker, "finish", tracker.finish)

    def _call(self, tracker: Tracker, name: str, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:
            if id(tracker) not in self._failed:
                self._failed.add(id(tracker))
                warnings.warn(
                    f"rank 0: {name} of the tracker {type(tracker).__name__} failed:"
                    f" {type(error).__name__}: {error}. Training goes on; further failures are not said",
                    stacklevel=5,
                )
