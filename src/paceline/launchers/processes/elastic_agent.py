"""torch's elastic agent, with worker processes of our own.

Rendezvous, ranks, restarts and the final barrier are `SimpleElasticAgent`'s. This differs from torchrun in
how workers are started and ended, and in how their output and failures are shown.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import math
import os
import signal
from collections.abc import Sequence
from typing import Any, cast

from torch._C._distributed_c10d import Store
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
from paceline.launchers.processes.failure import JobFailure, first_failure
from paceline.launchers.processes.worker_process import WorkerCommand, WorkerProcess
from paceline.launchers.processes.workers import Workers
from paceline.options import new_secret

_FAILURE_GRACE_S = 3.0
_EXIT_BARRIER_S = 60.0


class ElasticAgent(SimpleElasticAgent):
    """Starts, watches and ends the workers of one host."""

    def __init__(self, spec: WorkerSpec, job: JobSpec, console: Console) -> None:
        super().__init__(
            spec, exit_barrier_timeout=_EXIT_BARRIER_S, shutdown_timeout=math.ceil(job.stop_grace_s)
        )
        self._job = job
        self._console = console
        self._workers = Workers(console)
        self.failure: JobFailure | None = None
        self._lost: set[int] = set()

    @property
    def lost(self) -> frozenset[int]:
        """Ranks of this host that died while the job continued without them."""
        return frozenset(self._lost)

    def close(self) -> None:
        """End every process that is left on this host."""
        self._workers.close()

    def find_failure(self) -> JobFailure | None:
        """The first failure among this host's workers, which have all ended."""
        workers = self._worker_group.workers
        reasons = [w.exit_reason for w in self._workers.all if w.exit_code is not None]
        return first_failure(reasons, workers[0].world_size) if workers else None

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self._workers.forget()
        self._lost.clear()
        shared = self._shared_environment(worker_group)
        commands = {
            w.global_rank: WorkerCommand(
                self._words(w.local_rank),
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
        self._workers.start(commands, directory=self._job.working_directory)
        return {local: w.pid for local, w in enumerate(self._workers.all)}

    def _words(self, local_rank: int) -> tuple[str, ...]:
        option = self._job.local_rank_option
        return (*self._job.command, f"{option}={local_rank}") if option else self._job.command

    def _shared_environment(self, group: WorkerGroup) -> dict[str, str]:
        """The part of the environment that all workers of this host share; names as torchrun's."""
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
        return str(_store(group).compare_set("paceline/secret", "", new_secret()).decode())

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        ended = [w for w in self._workers.all if w.exit_code is not None]
        failed = [w for w in ended if w.exit_code]
        if failed and not self._continues_without(failed):
            return self._fail()
        if len(ended) < len(self._workers.all):
            return RunResult(state=WorkerState.HEALTHY)
        return RunResult(state=WorkerState.SUCCEEDED, return_values={w.rank: None for w in self._workers.all})

    def _continues_without(self, failed: Sequence[WorkerProcess]) -> bool:
        """Whether enough workers live. Rank 0 is needed, because the others agree through it."""
        if self._job.min_workers is None or any(w.rank == 0 for w in failed):
            return False
        new = [w for w in failed if w.rank not in self._lost]
        self._lost.update(w.rank for w in new)
        size = self._worker_group.workers[0].world_size
        num_lost = len(self._lost)
        if self._job.nodes > 1:
            num_lost = _store(self._worker_group).add("paceline/lost", len(new))
        if size - num_lost < self._job.min_workers:
            return False
        for worker in new:
            failure = first_failure([worker.exit_reason], size)
            if failure is not None:
                failure.show(self._console)
            self._console.note(
                f"continuing without rank {worker.rank}: {size - num_lost} of {size} workers live"
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


def _store(group: WorkerGroup) -> Store:
    """The rendezvous store. torch sets it in the rendezvous but declares it as None."""
    return cast(Store, group.store)
