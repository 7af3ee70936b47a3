"""Workers as processes on this host, or on several hosts that each run this launcher.

Source of ranks, restarts and rendezvous: torch.distributed.elastic.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from paceline.errors import CommError, ConfigError, Timeout
from paceline.launchers.job import JobSpec, address_towards, is_local, parse_endpoint, resolve
from paceline.launchers.processes import signals
from paceline.launchers.processes.console import Console
from paceline.launchers.runner import Engine, Outcome

if TYPE_CHECKING:
    from torch.distributed.elastic.agent.server.api import WorkerSpec

    from paceline.launchers.processes.elastic_agent import Agent

_MONITOR_S = 0.05
_RUN_ID = "paceline"
LOG_LEVEL = "TORCH_CPP_LOG_LEVEL"


class Local(Engine):
    """Processes on this host, by torch's elastic agent."""

    needs_rendezvous = True
    is_elastic = True  # downwards: jobs go on without workers that died

    def check(self, job: JobSpec) -> None:
        """Nothing is reserved here: only cpus have a meaning, as threads."""
        super().check(job)
        if job.max_workers is not None:
            raise ConfigError("engine local adds no workers to a job that runs; leave out --max-workers")
        if job.resources is not None and (job.resources.gpus or job.resources.memory_bytes):
            raise ConfigError(
                "engine local reserves neither gpus nor memory; of --resources only cpus= counts"
            )

    def run(self, job: JobSpec, *, console: Console) -> Outcome:
        """Run `job` to its end; afterwards none of its processes is left. The failure is not printed."""
        return run(job, console=console)


def run(job: JobSpec, *, console: Console | None = None) -> Outcome:
    """Run `job` to its end; afterwards none of its processes is left. The failure is not printed."""
    quiet_torch()
    from paceline.launchers.processes.elastic_agent import Agent

    with _quiet_elastic_logs(), signals.raised(lambda n: _signal_exception()(f"received {n.name}", n)):
        agent: Agent | None = None
        handler = None
        try:
            spec = _worker_spec(job, console := console or Console())
            handler = spec.rdzv_handler
            agent = Agent(spec, job, console)
            return _run_agent(agent, job, console)
        except _signal_exception() as error:
            return Outcome(128 + error.sigval, signal=error.sigval)
        finally:
            if agent is not None:
                agent.close()
            if handler is not None:
                with contextlib.suppress(Exception):  # the other hosts may have gone already
                    handler.shutdown()


def _run_agent(agent: Agent, job: JobSpec, console: Console) -> Outcome:
    from torch.distributed.elastic.rendezvous.api import RendezvousError, RendezvousTimeoutError

    try:
        result = agent.run()
    except RendezvousTimeoutError:
        raise Timeout(
            f"fewer than {job.nodes} hosts came to {job.rendezvous} within {job.join_timeout_s:g} s; "
            "start `paceline run` on each of them with the same --nodes and --rendezvous"
        ) from None
    except RendezvousError as error:
        console.note(f"the launcher at {job.rendezvous}, where the hosts meet, has ended: see what it says")
        if (failure := agent.find_failure()) is None:
            raise CommError(f"the rendezvous at {job.rendezvous} broke: {error}") from error
        return Outcome(failure.shell_code, failure=failure)
    if agent.failure is not None and (result is None or result.is_failed()):
        return Outcome(agent.failure.shell_code, failure=agent.failure)
    return Outcome(0, lost=agent.lost)


def _worker_spec(job: JobSpec, console: Console) -> WorkerSpec:
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.rendezvous import RendezvousParameters, registry

    host, port, local = "127.0.0.1", 0, "127.0.0.1"
    if job.rendezvous is not None:
        name, port = parse_endpoint(job.rendezvous)
        host = resolve(name)
        local = host if is_local(host) else address_towards(host, port)
    hosts_store = job.rendezvous is None or local == host
    if job.nodes > 1:
        console.note(f"this host is {local}; waiting for {job.nodes - 1} more at {job.rendezvous}")
    if not hosts_store:
        _await_store(host, port, job.join_timeout_s)
    parameters = RendezvousParameters(
        backend="c10d",
        endpoint=f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
        run_id=_RUN_ID,
        min_nodes=job.nodes,
        max_nodes=job.nodes,
        local_addr=local,
        is_host=str(hosts_store).lower(),
        join_timeout=int(job.join_timeout_s),
        last_call_timeout=1,
    )
    try:
        handler = registry.get_rendezvous_handler(parameters)
    except Exception as error:
        cause = error.__cause__ or error
        raise ConfigError(f"cannot open the rendezvous at {host}:{port}: {cause}") from error
    return WorkerSpec(
        role="default",
        local_world_size=job.num_workers,
        entrypoint=job.command[0],
        args=job.command[1:],
        rdzv_handler=handler,
        max_restarts=job.max_restarts or 0,
        monitor_interval=_MONITOR_S,
        local_addr=local,
    )


def _await_store(host: str, port: int, timeout_s: float) -> None:
    """Wait until somebody listens at the rendezvous. Interruptible, unlike torch's own waiting."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((host, port), timeout=2.0).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise Timeout(
                    f"nobody listens at the rendezvous {host}:{port} after {timeout_s:g} s ({error}); "
                    "the host with that address must run `paceline run` too"
                ) from None
            time.sleep(0.2)


def _signal_exception() -> type[Any]:
    from torch.distributed.elastic.multiprocessing import SignalException

    return SignalException


def quiet_torch() -> None:
    """Keep torch's C++ code from printing stacks when another host's launcher has gone: we say it ourselves.

    Read when torch is loaded, so this works for the command line and does nothing for `launch` after an
    import of torch. Workers do not inherit it.
    """
    if "torch" not in sys.modules and LOG_LEVEL not in os.environ:
        os.environ[LOG_LEVEL] = "FATAL"
        try:
            import torch  # noqa: F401
        finally:
            del os.environ[LOG_LEVEL]


@contextlib.contextmanager
def _quiet_elastic_logs() -> Iterator[None]:
    """Failures are reported by us, once; torch's loggers would repeat them at length."""
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
