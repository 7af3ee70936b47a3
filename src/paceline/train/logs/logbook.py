"""Measurements of a run: a row whenever `job.log` is called, and a row per rank at the end.

`log.jsonl` and `log.csv` (rank 0) have one row per call: `epoch`, `step`, `seconds` of training, then what
happened since the row before: `samples_per_s` (all ranks), `payload_bytes` and `wait_s` (this rank, training
only), `staleness` (updates by others that the last pull brought; empty where the strategy has none); then the
caller's values. `ranks.jsonl` and `ranks.csv` have one row per rank with what `job.stats()` counts (in a
simulation only with `init(log_dir=)`).
A resumed run appends; where steps repeat, the later row counts.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from paceline import registry
from paceline.errors import ConfigError
from paceline.train.logs.trackers import Trackers
from paceline.types import Store

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


class LogFile(Protocol):
    """What a log format opens."""

    def write(self, row: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class TrainingCounts:
    """What a job has done so far."""

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    """Of training."""
    samples: int = 0
    """Of all ranks."""
    payload_bytes: int = 0
    """Sent by this rank while training."""
    wait_s: float = 0.0
    """Waited by this rank while training."""
    staleness: float | None = None
    """Updates by others that the last pull brought; None where the strategy has none."""


class Logbook:
    """Writes rows; nothing is made before the first row. A file that cannot be written is a warning, once.

    Args:
        rank: This rank; rank 0 writes the files.
        size: Number of ranks.
        folder: Where the files go; default `runs/<date>-<time>` below the current folder.
        formats: Names of log formats, or one string with commas; default jsonl and csv.
        store: The job's store, through which ranks hand over their last row; None: `gather` collects them.
        gather: Collective: one row of every rank, off the clock; used where there is no store.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        *,
        folder: str | os.PathLike[str] | None = None,
        formats: Sequence[str] | str | None = None,
        store: Store | None = None,
        gather: Callable[[dict[str, Any]], list[dict[str, Any]]] | None = None,
    ) -> None:
        self._rank, self._size, self._store, self._gather = rank, size, store, gather
        self._folder = None if folder is None else Path(folder)
        # Decided alike on all ranks, while the default folder is that of rank 0 alone, once it has a row.
        self._can_collect = size == 1 or store is not None or (folder is not None and gather is not None)
        self._formats = check_formats(formats)
        self._logs: list[LogFile] | None = None
        self._first_step: int | None = None
        self._before = TrainingCounts()
        self._is_summed_up = False
        self._num_summaries = 0
        self._has_warned = False
        self.trackers = Trackers(is_main=rank == 0)

    @property
    def folder(self) -> Path:
        """Where the files are; by default `runs/<date>-<time>` below the current folder."""
        if self._folder is None:
            self._folder = Path("runs") / time.strftime("%Y%m%d-%H%M%S")
        return self._folder

    def resume(self, counts: TrainingCounts) -> None:
        """The job continues from a checkpoint: what was trained before it is not this run's."""
        self._first_step, self._before = counts.step + 1, counts

    def record(self, counts: TrainingCounts, values: Mapping[str, Any]) -> None:
        """Write one row (rank 0; the others do nothing)."""
        self._is_summed_up = False
        if self._rank != 0:
            return
        row = self.measure(counts)
        if taken := [name for name in values if name in row]:
            raise ConfigError(
                f"job.log({', '.join(taken)}=…): every row has a column of that name from the job itself"
                f" ({', '.join(row)}); choose another name"
            )
        row.update((key, plain(value)) for key, value in values.items())
        self._write("log", [row])
        self.trackers.log(row, counts.step)

    def sum_up(self, statistics: Mapping[str, Any]) -> None:
        """Write one row per rank. All ranks call it at the end of training, and once more before they leave.

        Ranks hand their counts over through the job's store, not by a collective: one that died is missing
        from the file and does not delay the others for long.
        """
        if self._is_summed_up or statistics["steps"] == 0 or not self._can_collect:
            return
        self._is_summed_up, self._num_summaries = True, self._num_summaries + 1
        rows = self._collect({k: v for k, v in statistics.items() if _is_scalar(v)})
        if self._rank == 0 and (self._logs is not None or self._folder is not None):
            self._write("ranks", rows)

    def close(self, statistics: Mapping[str, Any]) -> None:
        """End the files. A process that dies of an exception does not wait for the others."""
        if self._store is not None and getattr(sys, "last_value", None) is None:
            self.sum_up(statistics)
        logs, self._logs = self._logs or (), None
        self._close_files(logs)
        self.trackers.finish()
        self._gather = None  # a job's own method: both could only be freed together, some time later

    def _write(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows to the files called `name`. A full disk must not end a training: rows are then lost."""
        logs = self._logs if name == "log" else None
        try:
            if logs is None:
                logs = self._open(name)
            for log in logs:
                for row in rows:
                    log.write(row)
        except OSError as error:
            self._warn(error)
            self._close_files(logs or ())
            logs = None  # opened again for the next row: perhaps there is room then
        if name == "log":
            self._logs = logs
        else:
            self._close_files(logs or ())

    def _close_files(self, logs: Sequence[LogFile]) -> None:
        for log in logs:
            try:
                log.close()
            except OSError as error:  # what was buffered is lost
                self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"rank {self._rank}: the log in {self.folder} cannot be written: {error}. Training goes on"
                " and rows are lost until it can; is there room on the disk?",
                stacklevel=4,
            )

    def _open(self, name: str) -> list[LogFile]:
        modules = [registry.load(_PACKAGE, n, kind="log format") for n in self._formats]
        self.folder.mkdir(parents=True, exist_ok=True)
        return [m.open_log(self.folder, name, self._first_step) for m in modules]

    def measure(self, counts: TrainingCounts) -> dict[str, Any]:
        """What happened since this was called last: the columns that every row has."""
        before, self._before = self._before, counts
        seconds, samples = counts.seconds - before.seconds, counts.samples - before.samples
        return {
            "epoch": counts.epoch,
            "step": counts.step,
            "seconds": round(counts.seconds, 6),
            "samples_per_s": round(samples / seconds, 3) if seconds > 0 else None,
            "payload_bytes": counts.payload_bytes - before.payload_bytes,
            "wait_s": round(counts.wait_s - before.wait_s, 6),
            "staleness": counts.staleness,
        }

    def _collect(self, mine: dict[str, Any]) -> list[dict[str, Any]]:
        """Rank 0: the rows of all ranks that hand one over in time."""
        if self._size == 1:
            return [mine]
        store = self._store
        if store is None:  # as in a simulation
            return [mine] if self._gather is None else self._gather(mine)
        keys = [f"summary/{self._num_summaries}/{r}" for r in range(self._size)]
        try:
            store.set(keys[self._rank], json.dumps(mine))
            if self._rank != 0:
                return []
            deadline = time.monotonic() + _OTHERS_S
            while not store.check(keys) and time.monotonic() < deadline:
                time.sleep(0.01)
            return [json.loads(store.get(key)) for key in keys if store.check([key])]
        except (RuntimeError, ConnectionError):  # the store's host has gone
            return [mine]


def plain(value: object) -> object:
    """A number for a tensor or array with one element; text for what is not a plain value."""
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "numel", lambda: getattr(value, "size", 1))() == 1:
        return item()
    return value if _is_scalar(value) else str(value)


def _is_scalar(value: object) -> bool:
    return isinstance(value, (str, int, float, bool, type(None)))
