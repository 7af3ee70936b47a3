"""A runner takes one `JobSpec` and runs it to its end on an engine: this host, Ray, Spark, Slurm, MPI.

`engines/` has one runner per file, named after its engine. Paceline has no scheduler: the engine decides
where processes go, when they start, and what happens when a machine is lost.
"""

from __future__ import annotations

import importlib.util
import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from paceline import registry
from paceline.errors import ConfigError
from paceline.launchers.job import JobSpec
from paceline.launchers.processes.console import Console
from paceline.launchers.processes.outcome import Outcome

PACKAGE = "paceline.launchers.engines"
DEFAULT = "local"


class Runner(ABC):
    """Runs jobs on one engine. Its module is imported without the engine's package; `run` imports that.

    A subclass defines `run` and sets the class variables that differ from these defaults:

    Args:
        extra: Paceline's extra that installs what the engine needs: `pip install 'paceline[EXTRA]'`.
        packages: Python modules that must be installed.
        options: Names of the `JobSpec.engine_options` that it knows, each with a line of help; "*" accepts
            any name.
        is_elastic: Whether a job may run with fewer or more workers than asked for, within `min_workers` and
            `max_workers`.
        can_ship: Whether it sends the folder `JobSpec.ship` to its hosts.
        needs_rendezvous: Whether each host runs a launcher of its own, so that hosts have to meet at
            `JobSpec.rendezvous`.
    """

    extra: ClassVar[str | None] = None
    packages: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[Mapping[str, str]] = MappingProxyType({})
    is_elastic: ClassVar[bool] = False
    can_ship: ClassVar[bool] = False
    needs_rendezvous: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The engine's name, which is that of the runner's file."""
        return type(self).__module__.rsplit(".", 1)[-1]

    def check(self, job: JobSpec) -> None:
        """Raise ConfigError for what this engine cannot do, before anything starts."""
        self.check_installed()
        self._check_options(job)
        if job.is_elastic and not self.is_elastic:
            raise ConfigError(
                f"engine {self.name} starts exactly the workers it is asked for;"
                " leave out --min-workers and --max-workers"
            )
        if job.ship is not None and not self.can_ship:
            raise ConfigError(
                f"engine {self.name} sends no code to its hosts (--ship {job.ship}): they must see the same"
                " folder, see --workdir"
            )
        if self.needs_rendezvous and job.nodes > 1 and job.rendezvous is None:
            raise ConfigError(
                f"--nodes {job.nodes} needs --rendezvous HOST:PORT, the same on every host; "
                "HOST is an address of one of them"
            )
        if not self.needs_rendezvous and job.rendezvous is not None:
            raise ConfigError(f"engine {self.name} tells its hosts where to meet; leave out --rendezvous")

    def _check_options(self, job: JobSpec) -> None:
        for option in job.engine_options if "*" not in self.options else ():
            if not self.options:
                raise ConfigError(f"engine {self.name} has no options of its own, got {option}=")
            if option not in self.options:
                raise ConfigError(registry.unknown(f"option of engine {self.name}:", option, self.options))

    def check_installed(self) -> None:
        """Raise ConfigError naming the extra to install."""
        missing = [p for p in self.packages if importlib.util.find_spec(p) is None]
        if missing:
            raise ConfigError(
                f"engine {self.name!r} needs {', '.join(missing)}: pip install 'paceline[{self.extra}]'"
            )

    def preview(self, job: JobSpec) -> str:
        """What `--dry-run` prints: what the engine would be asked to do. Nothing is started."""
        where = f" on each of {job.nodes} hosts" if job.nodes > 1 else ""
        return f"# engine {self.name}: {job.num_workers} workers{where}, each:\n{shlex.join(job.command)}\n"

    def load(self) -> None:  # noqa: B027  most engines need nothing
        """Import what takes long and is not needed to refuse a job; `run` calls this itself."""

    @property
    def dumps(self) -> Callable[[Any], bytes] | None:
        """Pickles functions that workers cannot import; None: plain pickle."""
        return None

    @abstractmethod
    def run(self, job: JobSpec, *, console: Console) -> Outcome:
        """Run `job` to its end and leave nothing behind; a failure is returned, not printed.

        On SIGINT, SIGTERM and SIGHUP the workers get SIGTERM, and SIGKILL after the job's grace time.

        Args:
            job: What to run; `check` has accepted it.
            console: Where the workers' output and the engine's messages go.
        """


def make(name: str) -> Runner:
    """The runner of engine `name`; ConfigError if there is none."""
    module = registry.load(PACKAGE, name, kind="engine")
    return registry.find_class(module, Runner)()  # type: ignore[type-abstract]
