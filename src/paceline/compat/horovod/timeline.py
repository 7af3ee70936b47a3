"""The timeline: negotiation and processing of every operation as a Chrome trace, written on rank 0.

Every tensor name is a process of the trace. Its first track shows the negotiation, with a tick for each rank
that asks; its second track shows the operation itself: a rank may ask again before rank 0 has finished.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

from paceline.compat.horovod.request import Request

_NEGOTIATION, _OPERATION = 0, 1
_FLUSH_ROWS = 1024
_END = b"\n]"


class _TraceFile:
    """A JSON list on disk that can be read after every write."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._file = FileIO(path, "w")
        self._end = 0

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write rows; OSError leaves those of earlier calls readable."""
        if not rows:
            return
        text = ",\n".join(json.dumps(r) for r in rows).encode()
        text = (b",\n" if self._end else b"[\n") + text
        try:
            self._write(text + _END)
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(self._end)
                if self._end:
                    self._write(_END)
            raise
        self._end += len(text)

    def _write(self, data: bytes) -> None:
        self._file.seek(self._end)
        while data:
            data = data[self._file.write(data) or 0 :]

    def close(self) -> None:
        self._file.close()


class Timeline:
    """Records what rank 0 coordinates and performs, between `start` and `stop`.

    Recording never waits for the disk: the rows are written by `flush`. A file that cannot be written costs
    the timeline, with a line on stderr, and not the training.

    Args:
        now: Clock in seconds.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._file: _TraceFile | None = None
        self._forget()

    def _forget(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._numbers: dict[tuple[int, str], int] = {}
        self._open: dict[tuple[int, str, int], Request] = {}
        self._start_s = self._now()
        self._marks_cycles = False

    def start(self, path: str | Path, *, mark_cycles: bool = False) -> None:
        """Record into a new file; a recording that is under way ends.

        Args:
            path: The file, which is overwritten.
            mark_cycles: Also mark when the background thread begins a round; default no.
        """
        self.stop()
        with self._writing:
            try:
                file = _TraceFile(str(path))
            except OSError as error:
                _warn(str(path), error)
                return
            with self._lock:
                self._forget()
                self._file, self._marks_cycles = file, mark_cycles
                began: dict[str, object] = {"start_time_since_epoch_in_micros": int(time.time() * 1e6)}
                self._introduce(0, began)
        self.flush()

    def stop(self) -> None:
        """End what is under way, write what is left and close the file; nothing if nothing is recorded."""
        with self._lock:
            if self._file is not None:
                for (_, _, track), request in list(self._open.items()):
                    self._end(request, track)
        self.flush()
        with self._writing, self._lock:
            file, self._file = self._file, None
            if file is not None:
                with contextlib.suppress(OSError):
                    file.close()

    def flush(self) -> None:
        """Write the rows recorded since the last call."""
        with self._writing:
            with self._lock:
                file, rows = self._file, self._rows
                self._rows = []
            if file is None:
                return
            try:
                file.append(rows)
            except OSError as error:
                _warn(file.path, error)
                with self._lock:
                    self._file = None
                with contextlib.suppress(OSError):
                    file.close()

    def flush_if_long(self) -> None:
        """Write the rows if there are many."""
        if len(self._rows) >= _FLUSH_ROWS:
            self.flush()

    # Recording; called from the message service, too

    def mark_cycle(self) -> None:
        """The background thread begins a round."""
        with self._lock:
            if self._file is not None and self._marks_cycles:
                self._rows.append(
                    {"ph": "i", "name": "CYCLE_START", "ts": self._now_us(), "pid": 0, "s": "g"}
                )

    def asked(self, rank: int, request: Request) -> None:
        """A rank asks for an operation; the first one begins its negotiation."""
        with self._lock:
            if self._file is not None:
                self._begin(request, _NEGOTIATION, f"NEGOTIATE_{request.kind.upper()}")
                self._row("X", request, _NEGOTIATION, name=str(rank), dur=0)

    def agreed(self, request: Request) -> None:
        """All ranks have asked for an operation, or it is given up."""
        with self._lock:
            self._end(request, _NEGOTIATION)

    def begun(self, requests: Sequence[Request]) -> None:
        """Rank 0 begins operations, which are performed as one."""
        with self._lock:
            if self._file is not None:
                for request in requests:
                    self._begin(request, _OPERATION, request.kind.upper())

    def done(self, requests: Sequence[Request]) -> None:
        """Rank 0 has performed operations."""
        with self._lock:
            for request in requests if self._file is not None else ():
                shape = ", ".join(str(s) for s in request.shapes)
                about = {"dtype": ", ".join(dict.fromkeys(request.dtypes)), "shape": shape}
                self._end(request, _OPERATION, args=about)

    def _begin(self, request: Request, track: int, name: str) -> None:
        key = (request.process_set, request.name, track)
        if key not in self._open:
            self._open[key] = request
            self._row("B", request, track, name=name)

    def _end(self, request: Request, track: int, **fields: object) -> None:
        """End a span, if it began in this file."""
        if self._open.pop((request.process_set, request.name, track), None) is not None:
            self._row("E", request, track, **fields)

    def _row(self, phase: str, request: Request, track: int, **fields: object) -> None:
        key = (request.process_set, request.name)
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = len(self._numbers) + 1
            self._introduce(number, {"name": request.name})
        self._rows.append({"ph": phase, "ts": self._now_us(), "pid": number, "tid": track, **fields})

    def _introduce(self, number: int, about: dict[str, object]) -> None:
        """Describe a process of the trace and give it its place."""
        for name, args in (("process_name", about), ("process_sort_index", {"sort_index": number})):
            self._rows.append({"name": name, "ph": "M", "pid": number, "args": args})

    def _now_us(self) -> int:
        return int((self._now() - self._start_s) * 1e6)


def _warn(path: str, error: OSError) -> None:
    print(
        f"paceline horovod: the timeline {path} cannot be written: {error}. Training goes on without it; is "
        "there room on the disk?",
        file=sys.stderr,
        flush=True,
    )
