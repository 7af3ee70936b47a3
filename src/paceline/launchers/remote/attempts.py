"""A job on supervisors: its attempts, each with ranks, environments, output and failures.

What differs between engines is behind `Driver`; what users see is the same as on this host.
"""

from __future__ import annotations

import dataclasses
import os
import secrets
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from paceline.errors import CommError
from paceline.launchers.job import JobSpec
from paceline.launchers.processes import signals
from paceline.launchers.processes.console import Console
from paceline.launchers.processes.failure import ExitReason, JobFailure, first_failure
from paceline.launchers.processes.outcome import Outcome
from paceline.launchers.remote import supervisor
from paceline.launchers.remote.driver import DEFAULT_RESTARTS, Driver
from paceline.launchers.remote.events import (
    BarEvent,
    Event,
    ExitEvent,
    LineEvent,
    LostEvent,
    ProgressEvent,
)
from paceline.launchers.remote.supervisor import StartCommand, WorkerLocation
from paceline.options import JobOptions, new_job_id, new_secret

_FAILURE_GRACE_S = 3.0
_SLACK_S = 20.0


def run_job(job: JobSpec, driver: Driver, console: Console) -> Outcome:
    """Run `job` on the driver's supervisors to its end, with its restarts, and close the driver."""
    outcome = Outcome(1)
    job = dataclasses.replace(job, options=dataclasses.replace(job.options, job_id=new_job_id()))
    try:
        with signals.noted():
            outcome = _run_attempts(job, driver, console)
    except signals.Stopped as error:
        outcome = Outcome.stopped_by(error.number)
    finally:
        console.end_bar()
        driver.close(succeeded=outcome.exit_code == 0)
    return outcome


def _run_attempts(job: JobSpec, driver: Driver, console: Console) -> Outcome:
    number = 0
    progress: bytes | None = None
    while True:
        attempt = _Attempt(job, driver, console, number, progress)
        reasons = attempt.run()
        failure = first_failure(reasons, len(reasons))
        if failure is None:
            for reason in reasons:
                if job.call is not None and reason.result is not None:
                    job.call.store_result(reason.rank, reason.result)
            return Outcome(0)
        restarts_left = _restarts(job, failure) - number
        if restarts_left <= 0:
            for reason in reasons:
                if job.call is not None and reason.error is not None:
                    job.call.store_error(reason.rank, reason.error)
            return Outcome(failure.shell_code, failure=failure)
        failure.show(console)
        console.note(f"restarting all workers; {restarts_left} restarts were left")
        driver.prepare_restart()
        number += 1
        progress = attempt.progress


def _restarts(job: JobSpec, failure: JobFailure) -> int:
    if job.max_restarts is not None:
        return job.max_restarts
    # Killed by the system for lack of memory, with its host, or by hand.
    was_killed = failure.exit_code == -signal.SIGKILL
    return DEFAULT_RESTARTS if was_killed else 0


class _Attempt:
    """All workers once, from their start to their end."""

    def __init__(
        self, job: JobSpec, driver: Driver, console: Console, number: int, progress: bytes | None
    ) -> None:
        self._job = job
        self._driver = driver
        self._console = console
        self._number = number
        self.progress = progress
        """What a worker of this attempt, or of an earlier one, kept last for the next."""
        self._reasons: dict[int, ExitReason] = {}
        self._rank_of: dict[int, int] = {}  # index of a supervisor → rank of its worker
        self._locations: list[WorkerLocation] = []  # by rank

    def run(self) -> list[ExitReason]:
        """Start the workers and wait for their end; how each rank ended."""
        placed = self._driver.gather()
        hosts = list(dict.fromkeys(location.host for location in placed))
        # Ranks of one host are neighbours.
        indices = sorted(range(len(placed)), key=lambda i: hosts.index(placed[i].host))
        self._rank_of = {index: rank for rank, index in enumerate(indices)}
        self._locations = [placed[index] for index in indices]
        try:
            self._start(indices)
            self._wait_for_workers()
        except CommError as error:  # a supervisor was lost before its worker started
            self._driver.stop(0.0, self._number)
            return [supervisor.lost(r, where, str(error)) for r, where in enumerate(self._locations)]
        except signals.Stopped:
            self._driver.stop(self._job.stop_grace_s, self._number)
            self._collect_until(time.monotonic() + self._job.stop_grace_s + _SLACK_S)
            raise
        for rank, location in enumerate(self._locations):
            late = supervisor.lost(rank, location, "it did not end when told to")
            self._reasons.setdefault(rank, late)
        return [self._reasons[rank] for rank in range(len(placed))]

    def _start(self, indices: Sequence[int]) -> None:
        several = len({location.host for location in self._locations}) > 1
        secret = new_secret()
        store = self._driver.open_store(indices[0], secret, self._locations[0].address if several else None)
        options = dataclasses.replace(
            self._job.options, secret=secret, store=store, bar_columns=self._console.bar_columns
        )
        environments = _environments(self._job, options, self._locations, self._number)
        for rank, index in enumerate(indices):
            command = _start_command(self._job, rank, self._number, environments[rank], self.progress)
            self._driver.start(index, command)

    def _wait_for_workers(self) -> None:
        while len(self._reasons) < len(self._locations):
            self._collect(0.5)
            signals.check()
            if any(reason.has_failed for reason in self._reasons.values()):
                self._driver.stop(_FAILURE_GRACE_S, self._number)
                self._collect_until(time.monotonic() + _FAILURE_GRACE_S + _SLACK_S)
                return

    def _collect_until(self, deadline: float) -> None:
        while len(self._reasons) < len(self._locations) and time.monotonic() < deadline:
            if signals.is_urgent():
                return
            self._collect(0.2)

    def _collect(self, wait_s: float) -> None:
        for index, event in self._driver.poll(wait_s):
            self._handle(self._rank_of[index], event)

    def _handle(self, rank: int, event: Event) -> None:
        match event:
            case LineEvent(text, is_error):
                self._console.line(rank, text, error=is_error)
            case BarEvent(text):
                self._console.bar(rank, text)
            case ProgressEvent(content):
                self.progress = content
            case ExitEvent(reason):
                dated = dataclasses.replace(reason, began_s=time.monotonic() + reason.began_s)
                self._reasons.setdefault(rank, dated)
            case LostEvent(why):
                self._reasons.setdefault(rank, supervisor.lost(rank, self._locations[rank], why))


def _start_command(
    job: JobSpec, rank: int, attempt: int, environment: dict[str, str], progress: bytes | None
) -> StartCommand:
    is_python = job.command[0] == sys.executable
    command = job.command[1:] if is_python else job.command
    directory = None
    if job.ship is None:
        directory = str((job.working_directory or Path()).resolve())
    content = None
    if job.call is not None:
        command, content = command[:-1], job.call.content
    elif job.local_rank_option:
        command = (*command, f"{job.local_rank_option}={environment['LOCAL_RANK']}")
    return StartCommand(
        rank=rank,
        attempt=attempt,
        command=tuple(command),
        is_python=is_python,
        environment=environment,
        directory=directory,
        call=content,
        progress=progress,
    )


def _environments(
    job: JobSpec, options: JobOptions, locations: Sequence[WorkerLocation], attempt: int
) -> list[dict[str, str]]:
    """The environment of each rank; names as torchrun's."""
    hosts = list(dict.fromkeys(location.host for location in locations))
    shared = {
        "WORLD_SIZE": str(len(locations)),
        "GROUP_WORLD_SIZE": str(len(hosts)),
        "MASTER_ADDR": locations[0].address,
        # For scripts that read it: the workers meet in the job's own store.
        "MASTER_PORT": str(20000 + secrets.randbelow(10000)),
        "TORCHELASTIC_RESTART_COUNT": str(attempt),
        "TORCHELASTIC_RUN_ID": job.name,
        "OMP_NUM_THREADS": str(job.remote_worker_threads),
        "PYTHONFAULTHANDLER": "1",
        "PYTHONUNBUFFERED": "1",
        **({"NO_COLOR": os.environ["NO_COLOR"]} if "NO_COLOR" in os.environ else {}),
        **job.environment,
        **options.to_environment(),
    }
    return [
        shared
        | {
            "RANK": str(rank),
            "LOCAL_RANK": str(local_rank),
            "LOCAL_WORLD_SIZE": str(sum(w.host == locations[rank].host for w in locations)),
            "GROUP_RANK": str(hosts.index(locations[rank].host)),
        }
        for rank, local_rank in enumerate(supervisor.local_ranks(locations))
    ]
