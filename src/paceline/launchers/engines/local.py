"""Workers as processes on this host, or on several hosts that each run this launcher.

torch.distributed.elastic assigns ranks, restarts workers and lets the hosts meet.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from paceline.errors import CommError, ConfigError, Timeout
from paceline.launchers.job import JobSpec
from paceline.launchers.processes import signals, this_host
from paceline.launchers.processes.console import Console
from paceline.launchers.processes.outcome import Outcome
from paceline.launchers.runner import Runner

if TYPE_CHECKING:
    from paceline.launchers.processes.elastic_agent import ElasticAgent

LOG_LEVEL = "TORCH_CPP_LOG_LEVEL"


class LocalRunner(Runner):
    """Processes on this host, or on `--nodes` hosts, by torch's elastic agent. No options of its own.

    Example:
        paceline run -n 4 train.py
        paceline run --nodes 2 --rendezvous 10.0.0.1:29400 -n 4 train.py  (the same on each host)
    """

    needs_rendezvous = True
    is_elastic = True  # downwards only: jobs continue without workers that died

    def load(self) -> None:
        _load_torch_quietly()

    def check(self, job: JobSpec) -> None:
        """Refuse to add workers or to reserve resources: only cpus count, as a number of threads.

        The workers run on this host, so that interfaces and folders are looked at too.
        """
        super().check(job)
        if job.max_workers is not None:
            raise ConfigError("engine local adds no workers to a running job; leave out --max-workers")
        if job.resources is not None and (job.resources.gpus or job.resources.memory_bytes):
            raise ConfigError(
                "engine local reserves neither gpus nor memory; of --resources only cpus= counts"
            )
        this_host.check(job)

    def run(self, job: JobSpec, *, console: Console) -> Outcome:
        """Start the workers with torch's elastic agent and wait for their end."""
        self.load()
        from torch.distributed.elastic.multiprocessing import SignalException

        from paceline.launchers.processes.elastic_agent import ElasticAgent
        from paceline.launchers.processes.elastic_rendezvous import open_rendezvous

        # torch's agent knows its own exception only.
        with _quiet_elastic_logs(), signals.raised(lambda n: SignalException(f"received {n.name}", n)):
            agent: ElasticAgent | None = None
            rendezvous = None
            try:
                rendezvous = open_rendezvous(job, console)
                agent = ElasticAgent(rendezvous, job, console)
                return _run_agent(agent, job, console)
            except SignalException as error:
                return Outcome.stopped_by(error.sigval)
            finally:
                if agent is not None:
                    agent.close()
                if rendezvous is not None:
                    rendezvous.shutdown()


def _run_agent(agent: ElasticAgent, job: JobSpec, console: Console) -> Outcome:
    from torch.distributed import DistNetworkError
    from torch.distributed.elastic.rendezvous.api import RendezvousError, RendezvousTimeoutError

    try:
        result = agent.run()
    except RendezvousTimeoutError:
        raise Timeout(
            f"fewer than {job.nodes} hosts came to {job.rendezvous} within {job.join_timeout_s:g} s; "
            "start `paceline run` on each of them with the same --nodes and --rendezvous"
        ) from None
    except (RendezvousError, DistNetworkError) as error:
        console.note(f"the launcher at {job.rendezvous}, where the hosts meet, has ended: see its output")
        if (failure := agent.find_failure()) is None:
            raise CommError(f"the rendezvous at {job.rendezvous} broke: {error}") from error
        return Outcome(failure.shell_code, failure=failure)
    if agent.failure is not None and (result is None or result.is_failed()):
        return Outcome(agent.failure.shell_code, failure=agent.failure)
    return Outcome(0, lost=agent.lost)


def _load_torch_quietly() -> None:
    """Load torch so that its C++ code prints no stacks when another host's launcher has gone: we report that.

    torch reads the log level when it is loaded, so nothing changes if it is loaded already. Workers do not
    inherit the level.
    """
    if "torch" not in sys.modules and LOG_LEVEL not in os.environ:
        os.environ[LOG_LEVEL] = "FATAL"
        try:
            import torch  # noqa: F401
        finally:
            del os.environ[LOG_LEVEL]


@contextlib.contextmanager
def _quiet_elastic_logs() -> Iterator[None]:
    """Silence torch's loggers, which would repeat the failures that the launcher reports once."""
    import torch.distributed.elastic.agent.server.api
    import torch.distributed.elastic.rendezvous.dynamic_rendezvous  # noqa: F401 - creates its logger

    names = [n for n in logging.root.manager.loggerDict if n.startswith("torch.distributed.elastic")]
    before = {n: logging.getLogger(n).level for n in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
