"""An engine's own launcher (mpirun, srun, sbatch) as a child process: output by rank, signals, its end."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Protocol

from paceline.launchers.processes import orphan_guard
from paceline.launchers.processes.console import Console
from paceline.launchers.processes.output import LineReader, TracebackKeeper
from paceline.launchers.runner import Outcome

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_POLL_S = 0.05
_DRAIN_S = 5.0


class Splitter(Protocol):
    """Tells the ranks in one stream apart; the program's own words have rank None."""

    def feed(self, data: bytes) -> Iterator[tuple[int | None, bytes]]:
        """Yield (rank, text) for the bytes that arrived."""


class TaggedLines:
    """Every line starts with `tag`, a pattern whose first group is the rank."""

    def __init__(self, tag: bytes) -> None:
        self._tag, self._rest = re.compile(tag), b""

    def feed(self, data: bytes) -> Iterator[tuple[int | None, bytes]]:
        """Whole lines only: a tag is never cut in two."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            match = self._tag.match(line)
            yield (int(match[1]), line[match.end() :] + b"\n") if match else (None, line + b"\n")


class Marked:
    """Every piece of output starts with a mark: `mark`, the rank, `mark`. A piece need not be a line."""

    def __init__(self, mark: bytes) -> None:
        self._mark, self._rank = mark, re.compile(re.escape(mark) + rb"(\d+)" + re.escape(mark))
        self._now: int | None = None
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[tuple[int | None, bytes]]:
        """Text between two marks belongs to the first one's rank."""
        data, begin = self._rest + data, 0
        for match in self._rank.finditer(data):
            if match.start() > begin:
                yield self._now, data[begin : match.start()]
            self._now, begin = int(match[1]), match.end()
        cut = data.find(self._mark, begin)  # a mark that is still arriving
        cut = len(data) if cut < 0 or len(data) - cut > 16 else cut
        if cut > begin:
            yield self._now, data[begin:cut]
        self._rest = data[cut:]


class Program:
    """Runs one command to its end; afterwards no process that it started on this host is left."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._keepers: dict[int, TracebackKeeper] = {}
        self._lock = threading.Lock()
        self.said: list[str] = []
        """The program's own words."""

    def run(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        cwd: Path | None,
        splitters: tuple[Splitter, Splitter],
        grace_s: float,
        stop: Callable[[], Sequence[str]] | None = None,
    ) -> Outcome:
        """Start it and wait. A signal to this process ends it, by what `stop` names or by SIGTERM.

        `splitters`: for its standard output and its standard error.
        """
        token = secrets.token_hex(16)
        received: list[signal.Signals] = []
        with _noting(received):
            child = subprocess.Popen(
                command,
                env={**environment, orphan_guard.VARIABLE: token},
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
            readers = [
                threading.Thread(target=self._read, args=(stream, splitter, is_error), daemon=True)
                for stream, splitter, is_error in (
                    (child.stdout, splitters[0], False),
                    (child.stderr, splitters[1], True),
                )
            ]
            for reader in readers:
                reader.start()
            try:
                while child.poll() is None and not received:
                    time.sleep(_POLL_S)
                if received:
                    self._stop(child, stop, grace_s)
            finally:
                if child.poll() is None:
                    child.kill()
                child.wait()
                orphan_guard.sweep(token)
                for reader in readers:
                    reader.join(_DRAIN_S)
                for stream in (child.stdout, child.stderr):
                    if stream is not None:
                        stream.close()
        if received:
            return Outcome(128 + received[0], signal=received[0])
        self._show_tracebacks(quietly=child.returncode == 0)
        code = child.returncode
        return Outcome(128 - code if code < 0 else code)

    def _stop(
        self, child: subprocess.Popen[bytes], stop: Callable[[], Sequence[str]] | None, grace_s: float
    ) -> None:
        if stop is not None:
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                subprocess.run(stop(), check=False, capture_output=True, timeout=30)
        else:
            child.terminate()
        deadline = time.monotonic() + grace_s
        while child.poll() is None and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def _read(self, stream: object, splitter: Splitter, is_error: bool) -> None:
        lines: dict[int | None, LineReader] = {}
        fileno = stream.fileno()  # type: ignore[attr-defined]
        while data := os.read(fileno, 1 << 16):
            for rank, text in splitter.feed(data):
                for line, is_whole in lines.setdefault(rank, LineReader()).feed(text):
                    self._emit(rank, line, is_whole=is_whole, is_error=is_error)
        for rank, reader in lines.items():
            for line, _ in reader.finish():
                self._emit(rank, line, is_whole=True, is_error=is_error)

    def _emit(self, rank: int | None, line: str, *, is_whole: bool, is_error: bool) -> None:
        with self._lock:
            if rank is None:
                if is_whole:
                    self.said.append(line)
            elif not is_whole:
                self._console.bar(rank, line)
            elif is_error:
                keeper = self._keepers.setdefault(rank, TracebackKeeper())
                for shown in keeper.add(line.removeprefix(f"[rank{rank}]: "), time.monotonic()):
                    self._console.line(rank, shown, error=True)
            else:
                self._console.line(rank, line)

    def _show_tracebacks(self, *, quietly: bool) -> None:
        """What the keepers still hold; after a failure the earliest comes last, where it is read."""
        held = [(k.began_s or 0.0, rank, k) for rank, k in self._keepers.items() if k.is_holding]
        for _, rank, keeper in sorted(held, key=lambda h: h[:2], reverse=not quietly):
            for line in keeper.release():
                self._console.line(rank, line, error=True)


@contextlib.contextmanager
def _noting(received: list[signal.Signals]) -> Iterator[None]:
    """Note the signals that end a job instead of dying of them; only a main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, _frame: FrameType | None) -> None:
        received.append(signal.Signals(number))

    before = {number: signal.signal(number, note) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
