"""torch's elastic agent, with processes of our own.

Rendezvous, ranks, restarts and the final barrier are `SimpleElasticAgent`'s. What differs from torchrun is
how workers are started and ended, and what the user gets to see of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import math
import os
import signal
from collections.abc import Sequence
from typing import Any

from torch.distributed.elastic.agent.server.api import (
    RunResult,
    SimpleElasticAgent,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from paceline.comm.rendezvous.interfaces import interface_of
from paceline.launchers.job import JobSpec, read_secret
from paceline.launchers.processes.console import Console
from paceline.launchers.processes.failure import Failure, first_failure
from paceline.launchers.processes.workers import Worker, Workers
from paceline.options import new_secret

_FAILURE_GRACE_S = 3.0
_EXIT_BARRIER_S = 60.0


class Agent(SimpleElasticAgent):
    """Starts, watches and ends the workers of one host."""

    def __init__(self, spec: WorkerSpec, job: JobSpec, console: Console) -> None:
        super().__init__(
            spec, exit_barrier_timeout=_EXIT_BARRIER_S, shutdown_timeout=math.ceil(job.stop_grace_s)
        )
        self._job = job
        self._console = console
        self._workers = Workers(console)
        self.failure: Failure | None = None
        self._lost: set[int] = set()

    @property
    def lost(self) -> frozenset[int]:
        """Ranks of this host whose deaths the job has survived."""
        return frozenset(self._lost)

    def close(self) -> None:
        """End every process that is left."""
        self._workers.close()

    def find_failure(self) -> Failure | None:
        """The first failure among this host's workers, which have all ended."""
        workers = self._worker_group.workers
        endings = [w.ending for w in self._workers.all if w.exit_code is not None]
        return first_failure(endings, workers[0].world_size) if workers else None

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self._workers.forget()
        self._lost.clear()
        shared = self._shared_environment(worker_group)
        commands = {
            w.global_rank: (
                self._command(w.local_rank),
                shared
                | {
                    "RANK": str(w.global_rank),
                    "LOCAL_RANK": str(w.local_rank),
                    "WORLD_SIZE": str(w.world_size),
                    "ROLE_RANK": str(w.role_rank),
                    "ROLE_WORLD_SIZE": str(w.role_world_size),
                },
            )
            for w in worker_group.workers
        }
        self._workers.start(commands, cwd=self._job.working_directory)
        return {local: w.pid for local, w in enumerate(self._workers.all)}

    def _command(self, local_rank: int) -> tuple[str, ...]:
        option = self._job.local_rank_option
        return (*self._job.command, f"{option}={local_rank}") if option else self._job.command

    def _shared_environment(self, group: WorkerGroup) -> dict[str, str]:
        """What all workers of this host find in their environment; names as torchrun's."""
        spec = group.spec
        options = dataclasses.replace(
            self._job.options,
            secret=self._secret(group),
            min_workers=self._job.min_workers or 0,
            bar_columns=self._console.bar_columns,
        )
        environment = {
            **os.environ,
            **self._job.environment,
            "GROUP_RANK": str(group.group_rank),
            "ROLE_NAME": spec.role,
            "LOCAL_WORLD_SIZE": str(spec.local_world_size),
            "GROUP_WORLD_SIZE": str(group.group_world_size),
            "MASTER_ADDR": str(group.master_addr),
            "MASTER_PORT": str(group.master_port),
            "TORCHELASTIC_RESTART_COUNT": str(spec.max_restarts - self._remaining_restarts),
            "TORCHELASTIC_MAX_RESTARTS": str(spec.max_restarts),
            "TORCHELASTIC_RUN_ID": spec.rdzv_handler.get_run_id(),
            "TORCHELASTIC_USE_AGENT_STORE": str(spec.rdzv_handler.use_agent_store),
            "OMP_NUM_THREADS": str(self._job.worker_threads(os.environ)),
            "PYTHONFAULTHANDLER": "1",  # a crash in C++ shows the Python line that led to it
            **options.to_environment(),
        }
        if self._job.nodes > 1 and (name := interface_of(spec.local_addr or "")):
            # Gloo would look up the host's name, which often leads to a loopback address.
            environment.setdefault("GLOO_SOCKET_IFNAME", name)
        return environment

    def _secret(self, group: WorkerGroup) -> str:
        """One secret for all workers of the job.

        One host: made here. Several: derived from the secret file if there is one; else made by the first
        host and shared through the rendezvous store, so anyone who can reach that port could learn it.
        """
        if self._job.nodes == 1:
            return new_secret()
        if self._job.secret_file is not None:
            key = read_secret(self._job.secret_file).encode()
            job = f"{group.master_addr}:{group.master_port}".encode()
            return hmac.new(key, job, hashlib.sha256).hexdigest()
        store: Any = group.store
        return str(store.compare_set("paceline/secret", "", new_secret()).decode())

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        ended = [w for w in self._workers.all if w.exit_code is not None]
        failed = [w for w in ended if w.exit_code]
        if failed and not self._goes_on_without(failed):
            return self._fail()
        if len(ended) < len(self._workers.all):
            return RunResult(state=WorkerState.HEALTHY)
        return RunResult(state=WorkerState.SUCCEEDED, return_values={w.rank: None for w in self._workers.all})

    def _goes_on_without(self, failed: Sequence[Worker]) -> bool:
        """Whether enough workers live; rank 0 is needed, because the others agree through it."""
        if self._job.min_workers is None or any(w.rank == 0 for w in failed):
            return False
        new = [w for w in failed if w.rank not in self._lost]
        self._lost.update(w.rank for w in new)
        size = self._worker_group.workers[0].world_size
        store: Any = self._worker_group.store
        num_lost = len(self._lost) if self._job.nodes == 1 else store.add("paceline/lost", len(new))
        if size - num_lost < self._job.min_workers:
            return False
        for worker in new:
            failure = first_failure([worker.ending], size)
            if failure is not None:
                failure.show(self._console)
            self._console.note(
                f"going on without rank {worker.rank}: {size - num_lost} of {size} workers live"
            )
        return True

    def _fail(self) -> RunResult:
        self._workers.stop(_FAILURE_GRACE_S)
        self.failure = self.find_failure()
        assert self.failure is not None
        if self._remaining_restarts > 0:
            self.failure.show(self._console)
            self._console.note(f"restarting all workers; {self._remaining_restarts} restarts were left")
        failed = {
            w.rank: ProcessFailure(local, w.pid, w.exit_code or 1, "<none>")
            for local, w in enumerate(self._workers.all)
            if w.exit_code or w.rank == self.failure.rank
        }
        return RunResult(state=WorkerState.FAILED, failures=failed)

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        self._workers.stop(_FAILURE_GRACE_S)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        self._workers.stop(timeout)
