"""What a launcher is asked to run, checked before any work starts."""

from __future__ import annotations

import ipaddress
import os
import socket
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from paceline.comm.rendezvous.interfaces import local_address_towards
from paceline.errors import ConfigError
from paceline.options import JobOptions

if TYPE_CHECKING:
    from paceline.launchers.call import Call

GRACE_S = 5.0
GRACE_WITH_CHECKPOINT_S = 30.0
MAX_WORKERS = 4096
DEFAULT_PORT = 29400


@dataclass(frozen=True)
class Resources:
    """What one worker needs. An engine that schedules by resources reserves it."""

    cpus: float = 1.0
    gpus: float = 0.0
    memory_bytes: int | None = None
    """None: not reserved."""

    def __post_init__(self) -> None:
        _at_least("cpus per worker (--resources cpus=)", self.cpus, 0)
        _at_least("gpus per worker (--resources gpus=)", self.gpus, 0)
        if self.memory_bytes is not None:
            _at_least("memory per worker (--resources memory=)", self.memory_bytes, 1)


@dataclass(frozen=True)
class JobSpec:
    """One job, the same for every engine. Raises ConfigError on construction if it cannot work on any."""

    command: tuple[str, ...]
    """What each worker executes: program and arguments. A first word that is this process's own
    `sys.executable` means "Python": on another host, the Python that the engine uses there."""
    num_workers: int
    """Workers on each of `nodes` hosts. With one node, an engine that places workers may use more hosts."""
    options: JobOptions = field(default_factory=JobOptions)
    call: Call | None = None
    """The function to run, when it is `launch` that asks: its results go into the call's folder."""
    name: str = "paceline"
    """What the engine calls the job in its own lists."""
    resources: Resources | None = None
    """For each worker; None: what the engine gives by default."""
    working_directory: Path | None = None
    """Where workers run; None: the launcher's current directory."""
    ship: Path | None = None
    """A folder of code that the engine sends to its hosts; workers run in a copy of it there."""
    min_workers: int | None = None
    """Elastic bounds over all hosts: a job that lost workers goes on with no fewer; None: no bound."""
    max_workers: int | None = None
    engine_options: Mapping[str, str] = field(default_factory=dict)
    """What only one engine knows, such as a cluster's address or a queue; see `Engine.options`."""
    nodes: int = 1
    rendezvous: str | None = None
    """HOST:PORT where hosts with a launcher each meet; HOST must be one of them."""
    secret_file: Path | None = None
    """A file with the job's secret, the same on every host; None: made for the job and shared there."""
    threads: int | None = None
    """Intra-op threads per worker; None: the cpus of `resources`, else OMP_NUM_THREADS if set, else
    this host's cores / workers."""
    max_restarts: int | None = None
    """How often all workers start again after a failure; None: the engine's own policy (local: never)."""
    grace_s: float | None = None
    """Seconds between SIGTERM and SIGKILL when the job is stopped."""
    join_timeout_s: float = 600.0
    """How long a host waits for the others."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Added to what workers inherit."""
    local_rank_option: str | None = None
    """"--local_rank" or "--local-rank": given to each worker with its local rank, as old launchers did."""

    def __post_init__(self) -> None:
        _at_least("workers (-n)", self.num_workers, 1)
        _at_least("nodes (--nodes)", self.nodes, 1)
        if self.max_restarts is not None:
            _at_least("restarts (--max-restarts)", self.max_restarts, 0)
        if self.num_workers > MAX_WORKERS:
            raise ConfigError(f"workers (-n): at most {MAX_WORKERS} on one host, got {self.num_workers}")
        if self.threads is not None:
            _at_least("threads per worker (--threads)", self.threads, 1)
        if self.grace_s is not None and not 0 <= self.grace_s < 1e6:
            raise ConfigError(f"grace (--grace): seconds from 0 up expected, got {self.grace_s:g}")
        self._check_bounds()
        for what, folder in (("--workdir", self.working_directory), ("--ship", self.ship)):
            if folder is not None and not folder.is_dir():
                raise ConfigError(f"{what} {folder}: a folder expected; there is none (in {Path.cwd()})")
        for name in self.environment:
            if not name or "=" in name or "\0" in name:
                raise ConfigError(f"environment variable {name!r}: NAME=VALUE expected")
        if self.rendezvous is not None:
            parse_endpoint(self.rendezvous)
        if self.secret_file is not None:
            read_secret(self.secret_file)

    def _check_bounds(self) -> None:
        least, most = self.min_workers, self.max_workers
        if least is not None:
            _at_least("--min-workers", least, 1)
        if (least or 1) > self.total_workers or (most is not None and most < self.total_workers):
            raise ConfigError(
                f"elastic bounds: --min-workers <= workers <= --max-workers expected,"
                f" got {least} <= {self.total_workers} <= {most}"
            )

    @property
    def total_workers(self) -> int:
        """Workers on all hosts."""
        return self.num_workers * self.nodes

    @property
    def stop_grace_s(self) -> float:
        """The grace to give: as asked, else longer when there is a checkpoint to write."""
        if self.grace_s is not None:
            return self.grace_s
        return GRACE_WITH_CHECKPOINT_S if self.options.checkpoint else GRACE_S

    def worker_threads(self, environment: Mapping[str, str]) -> int:
        """Intra-op threads for one worker on this host."""
        if self.threads is not None:
            return self.threads
        if self.resources is not None and self.resources.cpus >= 1:
            return int(self.resources.cpus)
        given = environment.get("OMP_NUM_THREADS", "")
        if given.isdigit() and int(given) > 0:
            return int(given)
        return max(1, len(os.sched_getaffinity(0)) // self.num_workers)


def _at_least(what: str, value: float, least: int) -> None:
    if not value >= least:
        raise ConfigError(f"{what}: at least {least} expected, got {value}")


def parse_endpoint(text: str) -> tuple[str, int]:
    """Split `host`, `host:port` or `[v6]:port`; the port defaults to 29400."""
    host, port = text, str(DEFAULT_PORT)
    if text.startswith("["):
        host, _, rest = text[1:].partition("]")
        port = rest[1:] if rest.startswith(":") else port
    elif text.count(":") == 1:
        host, port = text.split(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"rendezvous {text!r}: HOST:PORT with a port from 1 to 65535 expected")
    return host, int(port)


def resolve(host: str) -> str:
    """The IP address of `host`; ConfigError if it has none."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise ConfigError(
            f"rendezvous host {host!r} cannot be resolved ({error.strerror or error}); give its IP address"
        ) from None


def is_local(address: str) -> bool:
    """Whether `address` belongs to this host: exactly then can a socket be bound to it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def address_towards(peer: str, port: int) -> str:
    """The address of this host's interface that leads to `peer`; nothing is sent."""
    try:
        return local_address_towards(peer, port)
    except OSError as error:
        raise ConfigError(
            f"no route from this host to the rendezvous at {peer}: {error.strerror or error}"
        ) from None


def read_secret(path: Path) -> str:
    """The secret in `path`: at least 16 characters, in a file that only its owner can read."""
    try:
        mode = path.stat().st_mode
        text = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--secret-file {path}: cannot be read: {error}") from None
    if stat.S_ISREG(mode) and mode & 0o077:
        raise ConfigError(f"--secret-file {path}: others can read it; run `chmod 600 {path}`")
    if len(text) < 16:
        raise ConfigError(
            f"--secret-file {path}: at least 16 characters expected, got {len(text)}; "
            f"make one with `openssl rand -hex 32 > {path}`"
        )
    return text
