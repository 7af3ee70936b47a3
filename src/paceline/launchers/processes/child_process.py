"""An engine's own launcher (mpirun, srun, sbatch) as a child process: output by rank, signals, its end."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Protocol

from paceline.launchers.processes import signals, watchdog
from paceline.launchers.processes.console import Console
from paceline.launchers.processes.outcome import Outcome
from paceline.launchers.processes.output import LineReader, TracebackKeeper

_POLL_S = 0.05
_DRAIN_S = 5.0
_STOP_COMMAND_S = 30.0


class RankSplitter(Protocol):
    """Separates the ranks whose output shares one stream; the program's own messages have rank None."""

    def feed(self, data: bytes) -> Iterator[tuple[int | None, bytes]]:
        """Yield (rank, text) for the bytes that arrived."""


class TaggedLines:
    """Every line starts with a tag that names its rank.

    Args:
        tag: Pattern of the tag; its first group is the rank.
    """

    def __init__(self, tag: bytes) -> None:
        self._tag = re.compile(tag)
        self._pending = b""

    def feed(self, data: bytes) -> Iterator[tuple[int | None, bytes]]:
        """Whole lines only, so that no tag is cut in two."""
        *lines, self._pending = (self._pending + data).split(b"\n")
        for line in lines:
            match = self._tag.match(line)
            yield (int(match[1]), line[match.end() :] + b"\n") if match else (None, line + b"\n")


class MarkedPieces:
    """Every piece of output starts with a mark, the rank, and the mark again. A piece need not be a line.

    Args:
        mark: A byte string that does not occur in output.
    """

    def __init__(self, mark: bytes) -> None:
        self._mark = mark
        self._rank = re.compile(re.escape(mark) + rb"(\d+)" + re.escape(mark))
        self._current_rank: int | None = None
        self._pending = b""

    def feed(self, data: bytes) -> Iterator[tuple[int | None, bytes]]:
        """Text between two marks belongs to the rank of the first mark."""
        data, begin = self._pending + data, 0
        for match in self._rank.finditer(data):
            if match.start() > begin:
                yield self._current_rank, data[begin : match.start()]
            self._current_rank, begin = int(match[1]), match.end()
        cut = data.find(self._mark, begin)  # a mark that has arrived in part
        cut = len(data) if cut < 0 or len(data) - cut > 16 else cut
        if cut > begin:
            yield self._current_rank, data[begin:cut]
        self._pending = data[cut:]


class ChildProcess:
    """Runs one command to its end; afterwards no process that it started on this host is left."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._traceback_keepers: dict[int, TracebackKeeper] = {}
        self._lock = threading.Lock()
        self.messages: list[str] = []
        """Lines that the program itself printed, without those of ranks."""

    def run_to_end(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        directory: Path | None,
        splitters: tuple[RankSplitter, RankSplitter],
        grace_s: float,
        stop_command: Callable[[], Sequence[str]] | None = None,
    ) -> Outcome:
        """Start the command and wait for its end. A signal to this process stops it.

        Args:
            command: Program and arguments.
            environment: Its whole environment.
            directory: Where it runs; None: this process's current directory.
            splitters: For its standard output and for its standard error.
            grace_s: Seconds between the request to stop and SIGKILL.
            stop_command: Gives the command that stops it; None: it gets SIGTERM.
        """
        token = secrets.token_hex(16)
        with signals.noted() as received:
            child = subprocess.Popen(
                command,
                env={**environment, watchdog.VARIABLE: token},
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
            readers = self._start_readers(child, splitters)
            try:
                while child.poll() is None and not received:
                    time.sleep(_POLL_S)
                if received:
                    _stop(child, stop_command, grace_s)
            finally:
                if child.poll() is None:
                    child.kill()
                child.wait()
                watchdog.kill_marked(token)
                for reader in readers:
                    reader.join(_DRAIN_S)
                for stream in (child.stdout, child.stderr):
                    if stream is not None:
                        stream.close()
        if received:
            return Outcome.stopped_by(received[0])
        self._show_tracebacks(succeeded=child.returncode == 0)
        code = child.returncode
        return Outcome(128 - code if code < 0 else code)

    def _start_readers(
        self, child: subprocess.Popen[bytes], splitters: tuple[RankSplitter, RankSplitter]
    ) -> list[threading.Thread]:
        assert child.stdout is not None and child.stderr is not None
        out_splitter, error_splitter = splitters
        readers = [
            threading.Thread(target=self._read, args=(child.stdout, out_splitter, False), daemon=True),
            threading.Thread(target=self._read, args=(child.stderr, error_splitter, True), daemon=True),
        ]
        for reader in readers:
            reader.start()
        return readers

    def _read(self, stream: IO[bytes], splitter: RankSplitter, is_error: bool) -> None:
        lines: dict[int | None, LineReader] = {}
        descriptor = stream.fileno()
        while data := os.read(descriptor, 1 << 16):
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
                    self.messages.append(line)
            elif not is_whole:
                self._console.bar(rank, line)
            elif is_error:
                keeper = self._traceback_keepers.setdefault(rank, TracebackKeeper())
                for shown in keeper.add(line.removeprefix(f"[rank{rank}]: "), time.monotonic()):
                    self._console.line(rank, shown, error=True)
            else:
                self._console.line(rank, line)

    def _show_tracebacks(self, *, succeeded: bool) -> None:
        """Show tracebacks that are still held; after a failure the earliest comes last, where it is read."""
        held = [(k.began_s or 0.0, rank, k) for rank, k in self._traceback_keepers.items() if k.is_holding]
        for _, rank, keeper in sorted(held, key=lambda h: h[:2], reverse=not succeeded):
            for line in keeper.release():
                self._console.line(rank, line, error=True)


def _stop(
    child: subprocess.Popen[bytes], stop_command: Callable[[], Sequence[str]] | None, grace_s: float
) -> None:
    if stop_command is not None:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run(stop_command(), check=False, capture_output=True, timeout=_STOP_COMMAND_S)
    else:
        child.terminate()
    deadline = time.monotonic() + grace_s
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(_POLL_S)
