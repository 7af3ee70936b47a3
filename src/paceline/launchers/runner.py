"""What an engine is: something that exists and can run processes. One file per engine, named after it.

An engine takes one `JobSpec` and runs it to its end. Paceline brings no scheduler: where processes go,
when they start and what happens to a lost machine is the engine's business.
"""

from __future__ import annotations

import importlib.util
import shlex
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from paceline import registry
from paceline.errors import ConfigError
from paceline.launchers.job import JobSpec

if TYPE_CHECKING:
    from paceline.launchers.processes.console import Console
    from paceline.launchers.processes.failure import Failure

PACKAGE = "paceline.launchers.engines"
DEFAULT = "local"


@dataclass(frozen=True)
class Outcome:
    """How a job ended. What `job.call` returned or raised is in its folder."""

    exit_code: int
    failure: Failure | None = None
    signal: signal.Signals | None = None
    """The signal that the launcher received, if that is why the job ended."""
    lost: frozenset[int] = frozenset()
    """Ranks that died while the job went on."""


class Engine(ABC):
    """Runs jobs. An engine's module is imported without the package it drives; `run` imports that."""

    extra: ClassVar[str | None] = None
    """The extra of Paceline that installs what it needs: `pip install 'paceline[extra]'`."""
    packages: ClassVar[tuple[str, ...]] = ()
    """Modules that must be there."""
    options: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Names of `JobSpec.engine_options` that it knows, each with a line of help; "*" for any name."""
    is_elastic: ClassVar[bool] = False
    """Whether a job may run with fewer or more workers than asked for, within its bounds."""
    can_ship: ClassVar[bool] = False
    """Whether it sends `JobSpec.ship` along."""
    needs_rendezvous: ClassVar[bool] = False
    """Whether hosts meet at `JobSpec.rendezvous`, because each runs a launcher of its own."""

    @property
    def name(self) -> str:
        """Its file's name."""
        return type(self).__module__.rsplit(".", 1)[-1]

    def check(self, job: JobSpec) -> None:
        """Raise ConfigError for what this engine cannot do, before anything starts."""
        self.check_installed()
        for option in job.engine_options if "*" not in self.options else ():
            if not self.options:
                raise ConfigError(f"engine {self.name} has no options of its own, got {option}=")
            if option not in self.options:
                raise ConfigError(registry.unknown(f"option of engine {self.name}:", option, self.options))
        if not self.is_elastic and (job.min_workers, job.max_workers) != (None, None):
            raise ConfigError(
                f"engine {self.name} starts exactly the workers it is asked for;"
                " leave out --min-workers and --max-workers"
            )
        if job.ship is not None and not self.can_ship:
            raise ConfigError(
                f"engine {self.name} sends no code along (--ship {job.ship}): its hosts must see the same"
                " folder, see --workdir"
            )
        if self.needs_rendezvous and job.nodes > 1 and job.rendezvous is None:
            raise ConfigError(
                f"--nodes {job.nodes} needs --rendezvous HOST:PORT, the same on every host; "
                "HOST is an address of one of them"
            )
        if not self.needs_rendezvous and job.rendezvous is not None:
            raise ConfigError(f"engine {self.name} tells its hosts where to meet; leave out --rendezvous")

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

    @property
    def dumps(self) -> Callable[[Any], bytes] | None:
        """Pickles functions that cannot be imported where workers run; None: plain pickle."""
        return None

    @abstractmethod
    def run(self, job: JobSpec, *, console: Console) -> Outcome:
        """Run `job` to its end and leave nothing behind; the failure is not printed.

        On SIGINT, SIGTERM and SIGHUP the workers are stopped with their grace time.
        """


def make(name: str) -> Engine:
    """The engine of that name; ConfigError if there is none."""
    return registry.find_class(registry.load(PACKAGE, name, kind="engine"), Engine)()  # type: ignore[type-abstract]
