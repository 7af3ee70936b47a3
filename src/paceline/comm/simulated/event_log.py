"""The events of a simulation, in virtual time: a log for comparing runs, and a trace for viewing."""

from __future__ import annotations

import hashlib
import json
from math import isfinite
from pathlib import Path
from typing import NamedTuple


class Event(NamedTuple):
    """Something that lasted from `start_s` to `end_s` on `rank`."""

    start_s: float
    end_s: float
    rank: int
    kind: str
    """"compute", "work" (codecs, servers, outer steps), "message", "collective", "fault", "lost" (a message
    that never arrives)."""
    name: str
    peer: int
    num_bytes: int


class EventLog:
    """Events in the order in which they were scheduled."""

    def __init__(self, *, is_recording: bool = True) -> None:
        self.events: list[Event] = []
        self._is_recording = is_recording

    def add(
        self,
        kind: str,
        name: str,
        rank: int,
        start_s: float,
        end_s: float,
        *,
        peer: int = -1,
        num_bytes: int = 0,
    ) -> None:
        """Append an event, unless the log does not record."""
        if self._is_recording:
            self.events.append(Event(start_s, end_s, rank, kind, name, peer, num_bytes))

    def digest(self) -> str:
        """SHA-256 of the whole log: equal logs, equal digests."""
        return hashlib.sha256(repr(self.events).encode()).hexdigest()

    def write(self, path: str | Path) -> None:
        """Write one JSON object per line; an event that never ends has the end null."""
        with open(path, "w") as file:
            for event in self.events:
                row = event._asdict()
                row["end_s"] = event.end_s if isfinite(event.end_s) else None
                file.write(json.dumps(row, allow_nan=False) + "\n")

    def write_trace(self, path: str | Path) -> None:
        """Write a Chrome/Perfetto trace: compute, collectives and messages of each worker.

        An event that never ends is drawn up to the end of all others.
        """
        over_s = max((e.end_s for e in self.events if isfinite(e.end_s)), default=0.0)
        ranks = sorted({e.rank for e in self.events})
        rows: list[dict[str, object]] = []
        for r in ranks:
            rows.append({"ph": "M", "name": "process_name", "pid": r, "args": {"name": f"worker {r}"}})
            for tid, name in enumerate(_ROWS):
                rows.append({"ph": "M", "name": "thread_name", "pid": r, "tid": tid, "args": {"name": name}})
        for e in self.events:
            row = {"compute": 0, "work": 0, "fault": 0, "collective": 1}.get(e.kind, 2)
            rows.append(
                {
                    "ph": "X",
                    "name": e.name,
                    "cat": e.kind,
                    "pid": e.rank,
                    "tid": row,
                    "ts": e.start_s * 1e6,
                    "dur": max(0.0, (e.end_s if isfinite(e.end_s) else over_s) - e.start_s) * 1e6,
                    "args": {"peer": e.peer, "num_bytes": e.num_bytes},
                }
            )
        whole = {"traceEvents": rows, "displayTimeUnit": "ms"}
        Path(path).write_text(json.dumps(whole, allow_nan=False))


_ROWS = ("compute", "collectives", "messages")
