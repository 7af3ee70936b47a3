"""A job on keepers that an engine placed: ranks, environment, output, failures and restarts.

What differs between engines is behind `Crew`; what users see is the same as on this host.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from paceline.errors import CommError, ConfigError
from paceline.launchers.job import JobSpec
from paceline.launchers.processes import signals
from paceline.launchers.processes.console import Console
from paceline.launchers.processes.failure import Ending, Failure, first_failure
from paceline.launchers.remote import supervisor
from paceline.launchers.remote.supervisor import Event, Member, Order
from paceline.launchers.runner import Outcome
from paceline.options import new_secret

FAILURE_GRACE_S = 3.0
LOSSES = 3
"""Restarts after lost workers, unless the job says otherwise. A failing script is not started again."""
_SLACK_S = 20.0
_GONE = "gone"


class Crew(ABC):
    """The keepers of one job."""

    progress: bytes | None = None
    """What a worker kept last for the next attempt."""

    @abstractmethod
    def gather(self, attempt: int) -> list[Member]:
        """Wait until all keepers of this attempt are there. Raises CommError if they do not come."""

    @abstractmethod
    def open_store(self, index: int) -> int:
        """`Keeper.open_store` of one keeper."""

    @abstractmethod
    def start(self, index: int, order: Order) -> None:
        """`Keeper.start` of one keeper."""

    @abstractmethod
    def poll(self, wait_s: float) -> list[tuple[int, Event]]:
        """Events of any keeper; `gone(why)` is the last of a keeper that is no more."""

    @abstractmethod
    def stop(self, grace_s: float, attempt: int) -> None:
        """`Keeper.stop` of all, without waiting."""

    @abstractmethod
    def prepare_restart(self) -> None:
        """All workers have ended and another attempt follows."""

    @abstractmethod
    def close(self, *, succeeded: bool) -> None:
        """Leave nothing behind."""


def check(job: JobSpec, engine: str) -> None:
    """Raise ConfigError for what no crew can do."""
    if job.secret_file is not None:
        raise ConfigError(
            f"engine {engine} gives its workers a secret over its own channels; leave out --secret-file"
        )


def wait_s(job: JobSpec, engine: str, *, default: float) -> float:
    """Seconds to wait for room: engine option `wait`. Raises ConfigError if it is no such number."""
    text = job.engine_options.get("wait", str(default))
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e6:
        raise ConfigError(f"engine {engine}: option wait={text}: seconds from 0 up expected")
    return seconds


def gone(why: str) -> Event:
    """The event of a keeper that is no more."""
    return (_GONE, why)


def work(job: JobSpec, crew: Crew, console: Console) -> Outcome:
    """Run `job` on `crew` to its end, with its restarts."""
    outcome = Outcome(1)
    try:
        with signals.noted():
            outcome = _work(job, crew, console)
    except signals.Stopped as error:
        outcome = Outcome(128 + error.sigval, signal=error.sigval)
    finally:
        console.end_bar()
        crew.close(succeeded=outcome.exit_code == 0)
    return outcome


def _work(job: JobSpec, crew: Crew, console: Console) -> Outcome:
    attempt = 0
    while True:
        endings = _Attempt(job, crew, console, attempt).run()
        failure = first_failure(endings, len(endings))
        if failure is None:
            for ending in endings:
                if job.call is not None and ending.result is not None:
                    job.call.leave("result", ending.rank, ending.result)
            return Outcome(0)
        left = _restarts(job, failure) - attempt
        if left <= 0:
            for ending in endings:
                if job.call is not None and ending.error is not None:
                    job.call.leave("error", ending.rank, ending.error)
            return Outcome(failure.shell_code, failure=failure)
        failure.show(console)
        console.note(f"restarting all workers; {left} restarts were left")
        crew.prepare_restart()
        attempt += 1


def _restarts(job: JobSpec, failure: Failure) -> int:
    if job.max_restarts is not None:
        return job.max_restarts
    was_killed = failure.exit_code == -9  # by the system for lack of memory, with its host, or by hand
    return LOSSES if was_killed else 0


class _Attempt:
    """All workers once, from their start to their end."""

    def __init__(self, job: JobSpec, crew: Crew, console: Console, attempt: int) -> None:
        self._job, self._crew, self._console, self._attempt = job, crew, console, attempt
        self._ends: dict[int, Ending] = {}

    def run(self) -> list[Ending]:
        """How every rank ended."""
        members = self._crew.gather(self._attempt)
        hosts = list(dict.fromkeys(m.host for m in members))
        order = sorted(range(len(members)), key=lambda i: hosts.index(members[i].host))
        self._rank_of = {index: rank for rank, index in enumerate(order)}
        self._members = [members[index] for index in order]
        try:
            port = self._crew.open_store(order[0])
            environments = _environments(self._job, self._members, port, self._attempt, self._console)
            for rank, index in enumerate(order):
                order_of_rank = _order(self._job, rank, self._attempt, environments[rank])
                self._crew.start(index, dataclasses.replace(order_of_rank, progress=self._crew.progress))
            self._watch()
        except CommError as error:  # a keeper that went before its worker began
            self._crew.stop(0.0, self._attempt)
            return [supervisor.lost(r, m, str(error)) for r, m in enumerate(self._members)]
        except signals.Stopped:
            self._crew.stop(self._job.stop_grace_s, self._attempt)
            self._until(time.monotonic() + self._job.stop_grace_s + _SLACK_S)
            raise
        for rank, member in enumerate(self._members):
            self._ends.setdefault(rank, supervisor.lost(rank, member, "it did not end when told to"))
        return [self._ends[rank] for rank in range(len(members))]

    def _watch(self) -> None:
        while len(self._ends) < len(self._members):
            self._take(0.5)
            signals.check()
            if any(e.has_failed for e in self._ends.values()):
                self._crew.stop(FAILURE_GRACE_S, self._attempt)
                self._until(time.monotonic() + FAILURE_GRACE_S + _SLACK_S)
                return

    def _until(self, deadline: float) -> None:
        while len(self._ends) < len(self._members) and time.monotonic() < deadline:
            if signals.is_urgent():
                return
            self._take(0.2)

    def _take(self, wait_s: float) -> None:
        for index, (kind, value) in self._crew.poll(wait_s):
            rank = self._rank_of[index]
            if kind == supervisor.LINE:
                self._console.line(rank, value[0], error=value[1])
            elif kind == supervisor.BAR:
                self._console.bar(rank, value)
            elif kind == supervisor.PROGRESS:
                self._crew.progress = value
            elif kind == supervisor.END:
                ending = dataclasses.replace(value, began_s=time.monotonic() + value.began_s)
                self._ends.setdefault(rank, ending)
            else:
                self._ends.setdefault(rank, supervisor.lost(rank, self._members[rank], value))


def _order(job: JobSpec, rank: int, attempt: int, environment: dict[str, str]) -> Order:
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
    return Order(rank, attempt, tuple(command), is_python, environment, directory, content)


def _environments(
    job: JobSpec, members: Sequence[Member], port: int, attempt: int, console: Console
) -> list[dict[str, str]]:
    """What each rank finds in its environment; names as torchrun's."""
    options = dataclasses.replace(job.options, secret=new_secret(), bar_columns=console.bar_columns)
    hosts = list(dict.fromkeys(m.host for m in members))
    cpus = job.resources.cpus if job.resources is not None else 1
    shared = {
        "WORLD_SIZE": str(len(members)),
        "GROUP_WORLD_SIZE": str(len(hosts)),
        "MASTER_ADDR": members[0].address,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RESTART_COUNT": str(attempt),
        "TORCHELASTIC_RUN_ID": job.name,
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": str(job.threads or max(1, int(cpus))),
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
            "LOCAL_RANK": str(local),
            "LOCAL_WORLD_SIZE": str(sum(m.host == members[rank].host for m in members)),
            "GROUP_RANK": str(hosts.index(members[rank].host)),
        }
        for rank, local in enumerate(supervisor.local_ranks(members))
    ]
