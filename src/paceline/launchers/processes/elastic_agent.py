"""torch's elastic agent, with worker processes of our own.

Rendezvous, ranks and restarts are `SimpleElasticAgent`'s. This differs from torchrun in how workers are
started and ended, in how their output and failures are shown, and in the wait of launchers for each other.
"""

from __future__ import annotations

import dataclasses
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
    WorkerState,
)
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from paceline.comm.rendezvous.interfaces import interface_of
from paceline.launchers.job import JobSpec
from paceline.launchers.processes.console import Console
from paceline.launchers.processes.elastic_rendezvous import HostRendezvous, worker_spec
from paceline.launchers.processes.failure import JobFailure, first_failure
from paceline.launchers.processes.host_beats import HostBeats
from paceline.launchers.processes.loss_watch import LossWatch
from paceline.launchers.processes.worker_process import WorkerCommand, WorkerProcess
from paceline.launchers.processes.workers import Workers
from paceline.options import new_job_id

_FAILURE_GRACE_S = 3.0


class ElasticAgent(SimpleElasticAgent):
    """Starts, watches and ends the workers of one host."""

    def __init__(self, rendezvous: HostRendezvous, job: JobSpec, console: Console) -> None:
        super().__init__(
            worker_spec(job, rendezvous),
            shutdown_timeout=math.ceil(job.stop_grace_s),
        )
        self._hosts = rendezvous
        self._job = job
        self._console = console
        self._workers = Workers(console)
        self._job_id = new_job_id()
        self.failure: JobFailure | None = None
        self._lost: set[int] = set()
        self._lost_elsewhere: set[int] = set()
        self._losses: LossWatch | None = None
        self._beats: HostBeats | None = None

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
        self._lost_elsewhere.clear()
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
        self._losses = LossWatch(
            self._hosts.lost_ranks(self._attempt), is_elastic=self._job.min_workers is not None
        )
        # torch declares both numbers as None.
        own, size = cast(int, worker_group.group_rank), cast(int, worker_group.group_world_size)
        self._beats = HostBeats(_store(worker_group), own, size, self._attempt)
        return {local: w.pid for local, w in enumerate(self._workers.all)}

    @property
    def _attempt(self) -> int:
        return int(self._worker_group.spec.max_restarts - self._remaining_restarts)

    def _words(self, local_rank: int) -> tuple[str, ...]:
        option = self._job.local_rank_option
        return (*self._job.command, f"{option}={local_rank}") if option else self._job.command

    def _shared_environment(self, group: WorkerGroup) -> dict[str, str]:
        """The part of the environment that all workers of this host share; names as torchrun's."""
        spec = group.spec
        options = dataclasses.replace(
            self._job.options,
            job_id=self._job_id,
            secret=self._hosts.secret,
            store=self._hosts.address,
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
            "TORCHELASTIC_RESTART_COUNT": str(self._attempt),
            "TORCHELASTIC_MAX_RESTARTS": str(spec.max_restarts),
            "TORCHELASTIC_RUN_ID": spec.rdzv_handler.get_run_id(),
            "TORCHELASTIC_USE_AGENT_STORE": str(spec.rdzv_handler.use_agent_store),
            "OMP_NUM_THREADS": str(self._job.worker_threads(os.environ)),
            "PYTHONFAULTHANDLER": "1",  # a crash in C++ shows the Python line that led to it
            **options.to_environment(),
        }
        if name := interface_of(self._hosts.local_address):
            # Gloo would look up the host's name: on one host, that often leads to an address that others can
            # reach, and on several to one that they cannot.
            environment.setdefault("GLOO_SOCKET_IFNAME", name)
        return environment

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        assert self._losses is not None and self._beats is not None
        self._beats.beat()
        ended = [w for w in self._workers.all if w.exit_code is not None]
        self._losses.look(self._workers.all, at_once=len(ended) == len(self._workers.all))
        self._tell_of_others()
        failed = [w for w in ended if w.exit_code or w.rank in self._losses.lost]
        if failed and not self._continues_without(failed):
            return self._fail()
        if len(ended) < len(self._workers.all):
            return RunResult(state=WorkerState.HEALTHY)
        return RunResult(state=WorkerState.SUCCEEDED, return_values={w.rank: None for w in self._workers.all})

    def _continues_without(self, failed: Sequence[WorkerProcess]) -> bool:
        """Whether enough workers live and can go on; rank 0 too, because the others agree through it."""
        assert self._losses is not None
        if self._job.min_workers is None or any(w.rank == 0 for w in failed):
            return False
        if not self._losses.are_tolerated():
            return False  # a loop of collectives, or a loss before `prepare`: the others wait for this one
        new = [w for w in failed if w.rank not in self._lost]
        self._lost.update(w.rank for w in new)
        size = self._worker_group.workers[0].world_size
        num_lost = len(self._lost)
        if self._job.nodes > 1:
            num_lost = _store(self._worker_group).add("paceline/lost", len(new))
        if size - num_lost < self._job.min_workers and any(w.exit_code for w in failed):
            return False
        for worker in new:
            self._losses.add_ended(worker.rank)
            failure = first_failure([worker.exit_reason], size)
            if failure is not None:
                failure.show(self._console)
            elif worker.exit_code == 0:
                why = self._losses.lost[worker.rank]
                self._console.note(f"rank {worker.rank} left in the middle of training, exit code 0: {why}")
            self._console.note(
                f"continuing without rank {worker.rank}: {size - num_lost} of {size} workers live"
            )
        return True

    def _tell_of_others(self) -> None:
        """Losses on other hosts. Their own launchers tell of them too, but may be cut off with them."""
        assert self._losses is not None
        own = {w.rank for w in self._workers.all}
        for rank in sorted(self._losses.lost.keys() - own - self._lost_elsewhere):
            self._lost_elsewhere.add(rank)
            self._console.note(f"rank {rank}, of another host, was lost: {self._losses.lost[rank]}")

    def _exit_barrier(self) -> None:
        """The launcher that holds the store stays until the others need it no more."""
        if self._beats is not None:
            self._beats.wait_for_others()

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
