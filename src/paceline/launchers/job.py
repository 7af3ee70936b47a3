"""What a launcher is asked to run, checked before anything starts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from paceline.comm.security.keys import read_secret
from paceline.errors import ConfigError
from paceline.launchers.endpoint import parse_endpoint
from paceline.options import JobOptions
from paceline.user_input import digits

if TYPE_CHECKING:
    from paceline.launchers.function_call import FunctionCall

GRACE_S = 5.0
GRACE_WITH_CHECKPOINT_S = 30.0
MAX_WORKERS = 4096


@dataclass(frozen=True)
class Resources:
    """What one worker needs. An engine that schedules by resources reserves it.

    Args:
        cpus: Cores; default 1. Also the worker's number of threads, unless `JobSpec.threads` is given.
        gpus: GPUs; default none. May be a fraction where the engine can share one.
        memory_bytes: Memory; None: not reserved.

    Raises:
        ConfigError: A number is negative, or no memory at all is asked for.
    """

    cpus: float = 1.0
    gpus: float = 0.0
    memory_bytes: int | None = None

    def __post_init__(self) -> None:
        _at_least("cpus per worker (--resources cpus=)", self.cpus, 0)
        _at_least("gpus per worker (--resources gpus=)", self.gpus, 0)
        if self.memory_bytes is not None:
            _at_least("memory per worker (--resources memory=)", self.memory_bytes, 1)


@dataclass(frozen=True)
class JobSpec:
    """One job, the same for every engine.

    Args:
        command: What each worker executes: program and arguments. A first word that is this process's own
            `sys.executable` means "Python": on another host, the Python that the engine uses there.
        num_workers: Workers on each of `nodes` hosts. With one node, an engine that places workers itself may
            use more hosts.
        options: What the workers are told about training: strategy, fabric, checkpoint, logs.
        call: The function to run when `launch` starts the job: its results go into the call's folder.
        name: The job's name in the engine's own lists.
        resources: What each worker needs; None: what the engine gives by default.
        working_directory: Where workers run; None: the launcher's current directory.
        ship: A folder of code that the engine sends to its hosts; workers run in a copy of it there.
        min_workers: The job continues after losing workers while this many live, over all hosts, from
            `prepare` with a strategy that can go on without them; None: any loss is a failure.
        max_workers: Start up to this many workers, over all hosts, when the engine has room; None: only those
            asked for.
        engine_options: What only one engine knows, such as a cluster's address or a queue; see
            `Runner.options`.
        nodes: Hosts; default 1.
        rendezvous: HOST:PORT where the hosts meet when each runs a launcher; HOST must be one of them.
        secret_file: A file with the job's secret, the same on every host; None: on one host, the secret is
            made for the job; on several, it is the account's key, `~/.config/paceline/key`.
        threads: Intra-op threads per worker; None: the cpus of `resources`, else OMP_NUM_THREADS if set, else
            this host's cores / workers.
        max_restarts: How many times all workers are restarted after a failure; None: the engine's own policy
            (local: never).
        grace_s: Seconds between SIGTERM and SIGKILL when the job is stopped; None: 30 with a checkpoint to
            write, else 5.
        join_timeout_s: Seconds that a host waits for the others.
        environment: Added to what workers inherit.
        local_rank_option: "--local_rank" or "--local-rank": given to each worker with its local rank, as
            old launchers did; None: not given.

    Raises:
        ConfigError: The job cannot work on any engine.

    Example:
        JobSpec(command=(sys.executable, "-u", "train.py"), num_workers=4, nodes=2)
    """

    command: tuple[str, ...]
    num_workers: int
    options: JobOptions = field(default_factory=JobOptions)
    call: FunctionCall | None = None
    name: str = "paceline"
    resources: Resources | None = None
    working_directory: Path | None = None
    ship: Path | None = None
    min_workers: int | None = None
    max_workers: int | None = None
    engine_options: Mapping[str, str] = field(default_factory=dict)
    nodes: int = 1
    rendezvous: str | None = None
    secret_file: Path | None = None
    threads: int | None = None
    max_restarts: int | None = None
    grace_s: float | None = None
    join_timeout_s: float = 600.0
    environment: Mapping[str, str] = field(default_factory=dict)
    local_rank_option: str | None = None

    def __post_init__(self) -> None:
        _at_least("workers (-n)", self.num_workers, 1)
        _at_least("nodes (--nodes)", self.nodes, 1)
        if not self.name.strip():
            raise ConfigError(f"name of the job (--name): at least one character expected, got {self.name!r}")
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
        least, most, total = self.min_workers, self.max_workers, self.total_workers
        if least is not None:
            _at_least("--min-workers", least, 1)
        if least is not None and least > total:
            raise ConfigError(f"--min-workers {least}: at most the {total} workers of -n × --nodes expected")
        if most is not None and most < total:
            raise ConfigError(f"--max-workers {most}: at least the {total} workers of -n × --nodes expected")

    @property
    def total_workers(self) -> int:
        """Workers on all hosts."""
        return self.num_workers * self.nodes

    @property
    def is_elastic(self) -> bool:
        """Whether the job may run with fewer or more workers than asked for."""
        return self.min_workers is not None or self.max_workers is not None

    @property
    def stop_grace_s(self) -> float:
        """`grace_s`, or its default: longer when there is a checkpoint to write."""
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
        if threads := digits(given):
            return threads
        return max(1, len(os.sched_getaffinity(0)) // self.num_workers)

    @property
    def remote_worker_threads(self) -> int:
        """Intra-op threads for one worker on a host whose number of cores is not known here."""
        return self.threads or max(1, int(self.resources.cpus if self.resources is not None else 1))


def _at_least(what: str, value: float, least: int) -> None:
    if not value >= least:
        raise ConfigError(f"{what}: at least {least} expected, got {value}")
