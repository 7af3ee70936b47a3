"""The rendezvous of torch's elastic agents, one per host, and the workers that each of them is to start."""

from __future__ import annotations

import socket
import time

from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.rendezvous import RendezvousParameters, registry

from paceline.errors import ConfigError, Timeout
from paceline.launchers.endpoint import address_towards, is_local, parse_endpoint, resolve
from paceline.launchers.job import JobSpec
from paceline.launchers.processes.console import Console

_MONITOR_S = 0.05
_RUN_ID = "paceline"
_LOOPBACK = "127.0.0.1"


def worker_spec(job: JobSpec, console: Console) -> WorkerSpec:
    """This host's workers for torch's elastic agent, with the handler of the rendezvous where hosts meet."""
    host, port, local = _LOOPBACK, 0, _LOOPBACK
    if job.rendezvous is not None:
        name, port = parse_endpoint(job.rendezvous)
        host = resolve(name)
        local = host if is_local(host) else address_towards(host, port)
    hosts_store = job.rendezvous is None or local == host
    if job.nodes > 1:
        console.note(f"this host is {local}; waiting for {job.nodes - 1} more at {job.rendezvous}")
    if not hosts_store:
        _wait_for_store(host, port, job.join_timeout_s)
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


def _wait_for_store(host: str, port: int, timeout_s: float) -> None:
    """Wait until the rendezvous accepts connections. Unlike torch's own waiting, signals interrupt it."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((host, port), timeout=2.0).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise Timeout(
                    f"no launcher listens at the rendezvous {host}:{port} after {timeout_s:g} s ({error}); "
                    "the host with that address must run `paceline run` too"
                ) from None
            time.sleep(0.2)
