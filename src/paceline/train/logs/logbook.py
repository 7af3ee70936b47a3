"""Measurements of a run: a row whenever `job.log` is called, and a row per rank at the end.

`log.jsonl` and `log.csv` (rank 0) have one row per call: `epoch`, `step`, `seconds` of training, then what
happened since the row before: `samples_per_s` (all ranks), `payload_bytes` and `wait_s` (this rank, training
only), `staleness` (updates by others that the last pull brought; empty where the strategy has none); then the
caller's values. `ranks.jsonl` and `ranks.csv` have one row per rank with what `job.stats()` counts.
A resumed run appends; where steps repeat, the later row counts.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline import registry
from paceline.errors import ConfigError

if TYPE_CHECKING:
    from paceline.train.job import Job

FORMATS = ("jsonl", "csv")
_PACKAGE = "paceline.train.logs.formats"
_OTHERS_S = 5.0


def check_formats(formats: Sequence[str] | str | None) -> tuple[str, ...]:
    """("jsonl", "csv") for None; one string may hold several, separated by commas. ConfigError for others."""
    if formats is None:
        return FORMATS
    names = formats.split(",") if isinstance(formats, str) else list(formats)
    known = registry.names(_PACKAGE)
    for name in names:
        if name not in known:
            raise ConfigError(registry.unknown("log format", str(name), known))
    return tuple(dict.fromkeys(names))


class Logbook:
    """Writes rows to `folder` in each of `formats`; nothing is made before the first row."""

    def __init__(
        self, folder: str | os.PathLike[str] | None = None, formats: Sequence[str] | str | None = None
    ) -> None:
        self._folder = None if folder is None else Path(folder)
        self._formats = check_formats(formats)
        self._logs: list[Any] | None = None
        self._first_step: int | None = None
        self._before = (0.0, 0, 0, 0.0)
        self._is_summed_up = False
        self._num_summaries = 0

    @property
    def folder(self) -> Path:
        """Where the files are; by default `runs/<date>-<time>` below the current folder."""
        if self._folder is None:
            self._folder = Path("runs") / time.strftime("%Y%m%d-%H%M%S")
        return self._folder

    def resume(self, job: Job) -> None:
        """The job goes on from a checkpoint: what was trained before it is not this run's."""
        self._first_step, self._before = job.step + 1, _counts(job)

    def record(self, job: Job, values: Mapping[str, Any]) -> None:
        """Write one row (rank 0; the others do nothing)."""
        self._is_summed_up = False
        if not job.is_main:
            return
        row = self.measure(job)
        row.update((key, plain(value)) for key, value in values.items())
        if self._logs is None:
            self._logs = self._open("log")
        for log in self._logs:
            log.write(row)

    def sum_up(self, job: Job) -> None:
        """Write one row per rank. All ranks call it at the end of training, and once more before they leave.

        Ranks hand their counts over through the job's store, not by a collective: one that died is missing
        from the file and holds up nobody for long.
        """
        if self._is_summed_up or job.step == 0:
            return
        self._is_summed_up, self._num_summaries = True, self._num_summaries + 1
        rows = self._collect(job, {k: v for k, v in job.stats().items() if _is_scalar(v)})
        if job.is_main and (self._logs is not None or self._folder is not None):
            logs = self._open("ranks")
            for log in logs:
                for row in rows:
                    log.write(row)
                log.close()

    def close(self, job: Job) -> None:
        """End the files. A process that dies of an exception does not wait for the others."""
        if job.meeting is not None and getattr(sys, "last_value", None) is None:
            self.sum_up(job)
        for log in self._logs or ():
            log.close()
        self._logs = None

    def _open(self, name: str) -> list[Any]:
        modules = [registry.load(_PACKAGE, n, kind="log format") for n in self._formats]
        self.folder.mkdir(parents=True, exist_ok=True)
        return [m.open_log(self.folder, name, self._first_step) for m in modules]

    def measure(self, job: Job) -> dict[str, Any]:
        """What happened since this was called last: the columns that every row has."""
        now = _counts(job)
        seconds, samples, sent, waited = (new - old for new, old in zip(now, self._before, strict=True))
        self._before = now
        staleness = job.strategy.stats().get("staleness") if job.attachments else None
        return {
            "epoch": job.epoch,
            "step": job.step,
            "seconds": round(job.clock.seconds, 6),
            "samples_per_s": round(samples / seconds, 3) if seconds > 0 else None,
            "payload_bytes": sent,
            "wait_s": round(waited, 6),
            "staleness": staleness,
        }

    def _collect(self, job: Job, mine: dict[str, Any]) -> list[dict[str, Any]]:
        """Rank 0: the rows of all ranks that hand one over in time."""
        if job.size == 1:
            return [mine]
        if job.meeting is None:  # no store, as in a simulation
            if self._folder is None:
                return [mine]
            with job.clock.paused():
                rows: list[dict[str, Any]] = job.gather_objects(mine)
            return rows
        store, keys = job.meeting.store, [f"summary/{self._num_summaries}/{r}" for r in range(job.size)]
        try:
            store.set(keys[job.rank], json.dumps(mine))
            if not job.is_main:
                return []
            deadline = time.monotonic() + _OTHERS_S
            while not store.check(keys) and time.monotonic() < deadline:
                time.sleep(0.01)
            return [json.loads(store.get(key)) for key in keys if store.check([key])]
        except (RuntimeError, ConnectionError):  # the store's host has gone
            return [mine]


def plain(value: Any) -> Any:
    """A number for a tensor or array with one element; text for what is not a plain value."""
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "numel", lambda: getattr(value, "size", 1))() == 1:
        return item()
    return value if _is_scalar(value) else str(value)


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (str, int, float, bool, type(None)))


def _counts(job: Job) -> tuple[float, int, int, float]:
    return job.clock.seconds, job.samples, job.clock.payload_bytes, job.clock.wait_s
