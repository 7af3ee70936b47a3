"""The driver of a job on an engine: what every engine offers to tell supervisors what to do.

Each engine reaches its supervisors in its own way; `remote.attempts` runs a job with any of these drivers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from paceline.errors import ConfigError
from paceline.launchers.job import JobSpec
from paceline.launchers.remote.events import Event
from paceline.launchers.remote.supervisor import StartCommand, WorkerLocation

DEFAULT_RESTARTS = 3
"""Restarts after lost workers when the job does not say. A failing script is then not restarted."""


class Driver(ABC):
    """The supervisors of one job. They are counted from 0, in an order that the engine chooses."""

    @abstractmethod
    def gather(self) -> list[WorkerLocation]:
        """Wait until all supervisors of an attempt are there. Raises CommError if they do not come."""

    @abstractmethod
    def open_store(self, index: int, secret: str, address: str | None) -> str:
        """`Supervisor.open_store` of one supervisor."""

    @abstractmethod
    def start(self, index: int, command: StartCommand) -> None:
        """`Supervisor.start` of one supervisor."""

    @abstractmethod
    def poll(self, wait_s: float) -> list[tuple[int, Event]]:
        """(index, event) of any supervisor; waits up to `wait_s` seconds for one."""

    @abstractmethod
    def stop(self, grace_s: float, attempt: int) -> None:
        """`Supervisor.stop` of all supervisors, without waiting."""

    @abstractmethod
    def prepare_restart(self) -> None:
        """Called when all workers have ended and another attempt follows."""

    @abstractmethod
    def close(self, *, succeeded: bool) -> None:
        """End all supervisors and release what the engine reserved."""


def check_secret(job: JobSpec, engine: str) -> None:
    """Raise ConfigError for a secret file: drivers make the secret themselves."""
    if job.secret_file is not None:
        raise ConfigError(
            f"engine {engine} gives its workers a secret over its own channels; leave out --secret-file"
        )


def parse_wait(job: JobSpec, engine: str, *, default: float) -> float:
    """Engine option `wait`: seconds to wait for room. Raises ConfigError if it is not such a number."""
    text = job.engine_options.get("wait", str(default))
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e6:
        raise ConfigError(f"engine {engine}: option wait={text}: seconds from 0 up expected")
    return seconds
