"""Time collective operations of several libraries side by side.

Every library's ranks are started once per number of ranks and wait for commands without using the processor.
A measurement is a block of back-to-back calls between two looks at the clock, and the slowest rank counts.
Blocks of the libraries alternate, so that a slow minute hits all alike; the median of the blocks is reported.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from paceline.bench.hardware import describe
from paceline.errors import ConfigError, WorkerFailed

OPERATIONS = (
    "all_reduce", "reduce_scatter", "all_gather", "broadcast", "reduce", "gather", "scatter", "all_to_all",
    "barrier",
)  # fmt: skip
FABRICS = ("native", "tcp")
_WORKER = Path(__file__).with_name("collective_worker.py")
_START_S, _ANSWER_S = 90.0, 180.0
_MAX_ITERATIONS = 5000


@dataclasses.dataclass(frozen=True)
class CollectiveTiming:
    """How long one library needs for one operation at one size."""

    operation: str
    num_bytes: int
    """Of the full per-rank buffer; of the result for all_gather."""
    ranks: int
    library: str
    fabric: str
    buffers: str
    """"private", or "allocated" by the communicator."""
    algorithm: str
    median_s: float
    """Of one call: median of the blocks, slowest rank."""
    bus_bytes_per_s: float
    """Bytes that a rank must send at least, by median_s."""


@dataclasses.dataclass(frozen=True)
class Limit:
    """What the machine can do: all ranks copy `num_bytes` in their own memory at once."""

    num_bytes: int
    ranks: int
    copy_s: float


@dataclasses.dataclass(frozen=True)
class Result:
    """All rows, and on what they were measured."""

    rows: list[CollectiveTiming]
    limits: list[Limit]
    hardware: dict[str, Any]

    def to_json(self) -> str:
        """Rows, limits and hardware as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def bus_share(operation: str, ranks: int) -> float:
    """Part of the buffer that a rank sends in the best algorithm known."""
    if operation == "all_reduce":
        return 2 * (ranks - 1) / ranks
    return 1.0 if operation in ("broadcast", "reduce") else (ranks - 1) / ranks


@dataclasses.dataclass(frozen=True)
class Peer:
    """A library to compare with: `python` runs its ranks."""

    library: str
    python: str = sys.executable
    name: str = ""


def parse_peers(text: str) -> list[Peer]:
    """`auto`, `none`, or a list of `gloo`, `mpi` (this environment's mpi4py), `NAME=PYTHON` (another's)."""
    if text == "none":
        return []
    if text == "auto":
        return [Peer("gloo"), *([Peer("mpi")] if _has_mpi(sys.executable) else [])]
    peers = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, python = item.partition("=")
        if python:
            if not os.path.isfile(python) or not os.access(python, os.X_OK) or not _has_mpi(python):
                raise ConfigError(
                    f"--peers {item}: {python} must be a Python with mpi4py and mpiexec beside it"
                )
            peers.append(Peer("mpi", python, name))
        elif item == "gloo":
            peers.append(Peer("gloo"))
        elif item in ("mpi", "openmpi", "mpich", "impi"):
            if not _has_mpi(sys.executable):
                raise ConfigError(
                    f"--peers {item}: no mpi4py and mpiexec in this environment; install them into their own"
                    f" and say --peers {item}=/that/environment/bin/python"
                )
            peers.append(Peer("mpi", name="" if item == "mpi" else item))
        else:
            raise ConfigError(f"--peers {item}: auto, none, gloo, mpi or NAME=PYTHON expected")
    return peers


def _mpiexec(python: str) -> str | None:
    beside = Path(python).with_name("mpiexec")
    return str(beside) if beside.exists() else shutil.which("mpiexec")


def _has_mpi(python: str) -> bool:
    probe = "import importlib.util as u; exit(u.find_spec('mpi4py') is None)"
    done = subprocess.run([python, "-c", probe], check=False, capture_output=True, timeout=60)
    return done.returncode == 0 and _mpiexec(python) is not None


class Team:
    """The ranks of one library, waiting for commands."""

    def __init__(self, peer: Peer, fabric: str, ranks: int) -> None:
        self.fabric, self.ranks = fabric, ranks
        self._token = secrets.token_hex(16)
        # In a folder that other accounts cannot enter.
        self._folder = tempfile.TemporaryDirectory(prefix="paceline-bench-")
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(f"{self._folder.name}/socket")
        self._server.listen(ranks)
        self._channels: list[Any] = []
        self._processes = self._start(peer)
        try:
            hellos = self._meet()
        except BaseException:
            self.close()
            raise
        self.name = peer.name or hellos[0]["name"]

    def _start(self, peer: Peer) -> list[subprocess.Popen[bytes]]:
        command = [peer.python, "-P", str(_WORKER), "--library", peer.library, "--fabric", self.fabric]
        command += ["--socket", str(self._server.getsockname())]
        environment = {**os.environ, "PACELINE_BENCH_TOKEN": self._token, "OMP_NUM_THREADS": "1"}
        for inherited in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PACELINE_JOB"):
            environment.pop(inherited, None)
        options: dict[str, Any] = {"start_new_session": True, "stdin": subprocess.DEVNULL}
        if peer.library == "mpi":
            mpiexec = _mpiexec(peer.python)
            assert mpiexec is not None
            launch = [mpiexec, "-n", str(self.ranks)]
            version = subprocess.run(
                [mpiexec, "--version"], check=False, capture_output=True, text=True, timeout=60
            )
            if "Open MPI" in version.stdout or "open-mpi" in version.stdout.lower():
                launch += ["--allow-run-as-root", "--oversubscribe"]
            return [subprocess.Popen([*launch, *command], env=environment, **options)]
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        place = {"WORLD_SIZE": self.ranks, "LOCAL_WORLD_SIZE": self.ranks, "MASTER_PORT": port}
        environment.update({k: str(v) for k, v in place.items()}, MASTER_ADDR="127.0.0.1")
        return [
            subprocess.Popen(command, env={**environment, "RANK": str(r), "LOCAL_RANK": str(r)}, **options)
            for r in range(self.ranks)
        ]

    def _meet(self) -> list[dict[str, Any]]:
        hellos: list[dict[str, Any]] = []
        deadline = time.monotonic() + _START_S
        self._server.settimeout(0.2)
        while len(hellos) < self.ranks:
            if time.monotonic() > deadline or any(p.poll() for p in self._processes):
                raise WorkerFailed(
                    f"bench: {len(hellos)} of {self.ranks} ranks came up; see their messages above"
                )
            try:
                connection, _ = self._server.accept()
            except TimeoutError:
                continue
            connection.settimeout(_ANSWER_S)
            channel = connection.makefile("rw")
            connection.close()  # the file keeps it open
            hello = json.loads(channel.readline() or "{}")
            if not secrets.compare_digest(str(hello.get("token", "")), self._token):
                channel.close()
                continue
            hellos.append(hello)
            self._channels.append(channel)
        return hellos

    def ask(self, **command: Any) -> list[dict[str, Any]]:
        """Give all ranks a command; their answers."""
        try:
            for channel in self._channels:
                channel.write(json.dumps(command) + "\n")
                channel.flush()
            return [json.loads(channel.readline()) for channel in self._channels]
        except (OSError, ValueError) as error:
            raise WorkerFailed(
                f"bench: a rank of {self.name} ({self.fabric}) failed at {command}: {error}"
            ) from error

    def block(self, iterations: int) -> float:
        """Seconds per call of a block, on the slowest rank."""
        return float(max(a["seconds"] for a in self.ask(do="block", iterations=iterations))) / iterations

    def close(self) -> None:
        """Stop the ranks; none survives."""
        for channel in self._channels:
            try:
                channel.write('{"do": "stop"}\n')
                channel.close()
            except OSError:
                pass
        self._server.close()
        self._folder.cleanup()
        for process in self._processes:
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                pass
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait(timeout=10)


def measure(
    *,
    operations: Sequence[str],
    sizes: Sequence[int],
    ranks: Sequence[int],
    peers: Sequence[Peer],
    fabrics: Sequence[str] = ("native",),
    blocks: int = 7,
    block_s: float = 0.05,
    on_row: Callable[[CollectiveTiming], None] = lambda row: None,
) -> Result:
    """Measure every operation, size (bytes) and number of ranks with Paceline's fabrics and the peers.

    Raises ConfigError for names and numbers that make no sense, WorkerFailed when a library's ranks fail.
    """
    for names, known, what in ((operations, OPERATIONS, "operation"), (fabrics, FABRICS, "fabric")):
        for name in names:
            if name not in known:
                raise ConfigError(f"unknown {what} {name!r}; known: {', '.join(known)}")
    if min(sizes, default=0) < 1 or min(ranks, default=0) < 1 or blocks < 1:
        raise ConfigError("sizes, ranks and blocks must be positive numbers")
    rows: list[CollectiveTiming] = []
    limits: list[Limit] = []
    for size in ranks:
        teams: list[Team] = []
        try:
            teams += [Team(Peer("paceline"), fabric, size) for fabric in fabrics]
            teams += [Team(peer, peer.library, size) for peer in peers]
            for num_bytes in sizes:
                limits.append(Limit(num_bytes, size, _limit(teams[0], num_bytes, blocks, block_s)))
            for operation in operations:
                for num_bytes in [sizes[0]] if operation == "barrier" else sizes:
                    for row in _contest(teams, operation, num_bytes, blocks, block_s):
                        rows.append(row)
                        on_row(row)
        finally:
            for team in teams:
                team.close()
    return Result(rows, limits, describe())


def _contest(
    teams: Sequence[Team], operation: str, num_bytes: int, blocks: int, block_s: float
) -> list[CollectiveTiming]:
    """All libraries on one operation and size; their blocks alternate."""
    rows = []
    entries = [(t, "private") for t in teams]
    if operation != "barrier":
        entries += [(t, "allocated") for t in teams if t.name == "paceline" and t.fabric == "native"]
    for buffers in ("private", "allocated"):
        chosen = [t for t, b in entries if b == buffers]
        algorithms = [
            t.ask(do="prepare", operation=operation, num_bytes=num_bytes, buffers=buffers)[0]["algorithm"]
            for t in chosen
        ]
        iterations = [_iterations(t, block_s) for t in chosen]
        times: list[list[float]] = [[] for _ in chosen]
        for _ in range(blocks):
            for i, team in enumerate(chosen):
                times[i].append(team.block(iterations[i]))
        for team, algorithm, seconds in zip(chosen, algorithms, times, strict=True):
            median_s = statistics.median(seconds)
            bus = num_bytes * bus_share(operation, team.ranks) / median_s if operation != "barrier" else 0.0
            rows.append(
                CollectiveTiming(
                    operation,
                    num_bytes,
                    team.ranks,
                    team.name,
                    team.fabric,
                    buffers,
                    algorithm,
                    median_s,
                    bus,
                )
            )
    return rows


def _iterations(team: Team, block_s: float) -> int:
    """Calls that take about `block_s`. A few take far longer each than many: ranks have to wake up first."""
    team.block(1)  # connections, page faults
    iterations = 2
    while True:
        call_s = max(team.block(iterations), 1e-7)
        wanted = max(1, min(_MAX_ITERATIONS, int(block_s / call_s)))
        if wanted <= 2 * iterations:
            return wanted
        iterations = min(wanted, 8 * iterations)


def _limit(team: Team, num_bytes: int, blocks: int, block_s: float) -> float:
    team.ask(do="prepare", operation="copy", num_bytes=num_bytes, buffers="private")
    iterations = _iterations(team, block_s)
    return statistics.median(team.block(iterations) for _ in range(blocks))
