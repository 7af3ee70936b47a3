"""What happened in a simulation, in virtual time: a log to compare runs by, and a trace to look at."""

from __future__ import annotations

import hashlib
import json
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple


class Event(NamedTuple):
    """One thing that took from `start_s` to `end_s` on `rank`."""

    start_s: float
    end_s: float
    rank: int
    kind: str
    """"compute", "message", "collective", "fault", "lost" (a message that never arrives)."""
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
        """Append an event."""
        if self._is_recording:
            self.events.append(Event(start_s, end_s, rank, kind, name, peer, num_bytes))

    def digest(self) -> str:
        """SHA-256 of the whole log: equal logs, equal digests."""
        return hashlib.sha256(repr(self.events).encode()).hexdigest()

    def write(self, path: str | Path) -> None:
        """One JSON object per line; what lasts for ever has the end null."""
        with open(path, "w") as file:
            for event in self.events:
                row = event._asdict()
                row["end_s"] = event.end_s if isfinite(event.end_s) else None
                file.write(json.dumps(row, allow_nan=False) + "\n")

    def write_trace(self, path: str | Path) -> None:
        """Chrome/Perfetto trace: per worker its compute, collectives and messages.

        What lasts for ever is drawn up to the end of everything else.
        """
        over_s = max((e.end_s for e in self.events if isfinite(e.end_s)), default=0.0)
        ranks = sorted({e.rank for e in self.events})
        rows: list[dict[str, Any]] = []
        for r in ranks:
            rows.append({"ph": "M", "name": "process_name", "pid": r, "args": {"name": f"worker {r}"}})
            for tid, name in enumerate(_ROWS):
                rows.append({"ph": "M", "name": "thread_name", "pid": r, "tid": tid, "args": {"name": name}})
        for e in self.events:
            row = {"compute": 0, "fault": 0, "collective": 1}.get(e.kind, 2)
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
