"""What a launcher tells its workers: one JSON value in the environment variable PACELINE_JOB.

One variable, written only by launchers and read only by `init()`, so that nothing else in the environment
can change a job. A script started without a launcher gets the defaults.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
from collections.abc import Mapping, Sequence

from paceline import plugins
from paceline.errors import ConfigError

VARIABLE = "PACELINE_JOB"


@dataclasses.dataclass(frozen=True)
class JobOptions:
    """Options that the command line gives to every worker; None means "as the script says"."""

    strategy: str | None = None
    """Overrides the strategy given to `prepare`."""
    fabric: str | None = None
    """"native" or "torch"."""
    interface: str = ""
    """Which interfaces or addresses of a host to use, as `interfaces.chosen` reads it; "": the route to
    the others."""
    checkpoint: str | None = None
    """Where to save on SIGTERM, and to resume from if a checkpoint is there."""
    log_dir: str | None = None
    """The folder that `job.log` writes to."""
    log_to: str | None = None
    """Names of log formats, separated by commas."""
    progress: bool = True
    bar_columns: int = 0
    """Width for a progress bar of lines that end in a carriage return, which the launcher draws on its
    terminal; 0: it has none."""
    min_workers: int = 0
    """Strategies that survive losses continue while this many workers live; 0: any loss ends the job."""
    job_id: str = ""
    """Made by the launcher; the same in all attempts of a job, and in no other job."""
    plugins: tuple[str, ...] = dataclasses.field(default_factory=plugins.files)
    """Files of plug-ins that workers load when they join; default: those that this process has loaded."""
    secret: str = ""
    """The key of the job, in hexadecimal; "": the workers use that of their account."""
    store: str = ""
    """Where the launcher's store listens: "unix:PATH" or "tcp:HOST:PORT"; "": the workers find one."""

    def to_environment(self) -> dict[str, str]:
        """The variable to add to a worker's environment."""
        return {VARIABLE: json.dumps(dataclasses.asdict(self))}

    def with_log(
        self, folder: str | os.PathLike[str] | None, formats: Sequence[str] | str | None
    ) -> JobOptions:
        """The same with the script's wishes for its log, where the launcher has none."""
        names = formats if formats is None or isinstance(formats, str) else ",".join(formats)
        return dataclasses.replace(
            self,
            log_dir=self.log_dir or (None if folder is None else os.fspath(folder)),
            log_to=self.log_to or names,
        )

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> JobOptions:
        """Read what the launcher wrote; the defaults where there is none."""
        text = environment.get(VARIABLE)
        if not text:
            return cls()
        try:
            fields = json.loads(text)
            return cls(**{**fields, "plugins": tuple(fields.get("plugins", ()))})
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(
                f"{VARIABLE} is written by `paceline run` and cannot be read here: {error}; unset it"
            ) from error


def new_job_id() -> str:
    """A name that no other job has: 16 hex digits."""
    return secrets.token_hex(8)


def new_secret() -> str:
    """A fresh per-job secret: 32 random bytes as hex."""
    return secrets.token_hex(32)
