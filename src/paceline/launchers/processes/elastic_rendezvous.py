"""Where the launchers of several hosts meet, for torch's elastic agent: one launcher per host.

torch's own rendezvous keeps its state in a store that anyone can reach, and unpickles it. This one keeps
strings in the job's store, which answers only to processes with the job's key; on one host, nothing listens
on a port.
"""

from __future__ import annotations

import contextlib
import datetime
import os

import torch.distributed as dist
from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
)

from paceline.comm.rendezvous.interfaces import is_local
from paceline.comm.rendezvous.job_store import JobStore, Prefixed
from paceline.comm.rendezvous.lost_ranks import LostRanks
from paceline.comm.rendezvous.store_server import StoreServer
from paceline.comm.rendezvous.stores import attempt_name
from paceline.comm.security.keys import account_key, derive, read_secret
from paceline.errors import ConfigError, ProtocolError, Timeout
from paceline.launchers.endpoint import address_towards, parse_endpoint, resolve
from paceline.launchers.job import JobSpec
from paceline.launchers.processes.console import Console
from paceline.options import new_secret

_MONITOR_S = 0.05
_RUN_ID = "paceline"
_LOOPBACK = "127.0.0.1"


class HostRendezvous(RendezvousHandler):
    """Counts the hosts of a job in rounds: one for its start, one for each restart of all workers.

    Args:
        job: The job; `nodes` hosts take part.
        secret: The key of the job, in hexadecimal.
        server: The store, on the host that has it; None: elsewhere.
        address: Where the store listens.
        local_address: This host's address, as the other hosts reach it.
    """

    def __init__(
        self, job: JobSpec, secret: str, server: StoreServer | None, address: str, local_address: str
    ) -> None:
        self.secret, self.address, self.local_address = secret, address, local_address
        self._server = server
        self._num_hosts, self._join_timeout = job.nodes, datetime.timedelta(seconds=job.join_timeout_s)
        self._rendezvous = job.rendezvous
        self._store = self._connect()
        self._round = 0
        self._host_rank = 0 if server is not None else self._store.add("hosts", 1)
        if self._host_rank >= self._num_hosts:
            raise ConfigError(
                f"the job at {job.rendezvous} has its {self._num_hosts} hosts already; was `paceline run`"
                " started twice on a host, or --nodes given too low?"
            )

    def _connect(self) -> JobStore:
        try:
            return JobStore(self.address, bytes.fromhex(self.secret), self._join_timeout)
        except ProtocolError:
            raise ConfigError(
                f"the launcher at {self._rendezvous} has another key than this host. Copy"
                " ~/.config/paceline/key from one host to all (mode 600), or give the same file to each with"
                " --secret-file"
            ) from None
        except dist.DistNetworkError as error:
            raise Timeout(
                f"no launcher listens at the rendezvous {self._rendezvous} after"
                f" {self._join_timeout.total_seconds():g} s ({error}); the host with that address must run"
                " `paceline run` too"
            ) from None

    def lost_ranks(self, attempt: int) -> LostRanks:
        """What rank 0 of an attempt says about ranks that are gone."""
        return LostRanks(Prefixed(attempt_name(attempt), self._store))

    def get_backend(self) -> str:
        """Name of this kind of rendezvous."""
        return "paceline"

    @property
    def use_agent_store(self) -> bool:
        """No: that would mean a TCPStore of torch."""
        return False

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for all hosts. Raises RendezvousTimeoutError, RendezvousConnectionError."""
        self._round += 1
        store = Prefixed(f"round_{self._round}", self._store)
        try:
            self._store.add(f"arrived_{self._round}", 1)
            store.set(f"host/{self._host_rank}", self.local_address)
            store.wait([f"host/{r}" for r in range(self._num_hosts)], self._join_timeout)
            info = RendezvousStoreInfo.build(self._host_rank, store, self.local_address)
        except dist.DistStoreError as error:
            raise RendezvousTimeoutError(str(error)) from error
        except dist.DistNetworkError as error:
            raise RendezvousConnectionError(str(error)) from error
        return RendezvousInfo(store, self._host_rank, self._num_hosts, info)

    def num_nodes_waiting(self) -> int:
        """Hosts that have begun the next round, because workers failed there."""
        if self._num_hosts == 1:
            return 0
        try:
            return self._store.add(f"arrived_{self._round + 1}", 0)
        except dist.DistNetworkError as error:
            raise RendezvousConnectionError(str(error)) from error

    def is_closed(self) -> bool:
        """Never: a job ends with its launchers."""
        return False

    def set_closed(self) -> None:
        """Nothing to close for the others."""

    def get_run_id(self) -> str:
        """A constant: each job has a store of its own."""
        return _RUN_ID

    def shutdown(self) -> bool:
        """Close the store, if this host has it."""
        with contextlib.suppress(Exception):  # the other hosts may have gone already
            self._store.close()
        if self._server is not None:
            self._server.close()
        return True


def open_rendezvous(job: JobSpec, console: Console) -> HostRendezvous:
    """The meeting place of the job's hosts. The one with the rendezvous address has the store.

    Raises:
        ConfigError: The address cannot be used, or the hosts have different keys.
        Timeout: The launcher of the host with the address does not come.
    """
    if job.nodes == 1 and job.rendezvous is None:
        secret = new_secret() if job.secret_file is None else _secret(read_secret(job.secret_file).encode())
        server = StoreServer(bytes.fromhex(secret))
        return HostRendezvous(job, secret, server, server.address, _LOOPBACK)
    name, port = parse_endpoint(job.rendezvous or _LOOPBACK)
    host = resolve(name)
    local = host if is_local(host) else address_towards(host, port)
    if job.nodes > 1:
        console.note(f"this host is {local}; waiting for {job.nodes - 1} more at {job.rendezvous}")
    key = account_key(os.environ) if job.secret_file is None else read_secret(job.secret_file).encode()
    secret = _secret(key)
    first = None
    if local == host:
        with contextlib.suppress(ConfigError):  # taken: by the first launcher of this host
            first = StoreServer(bytes.fromhex(secret), host=host, port=port)
    return HostRendezvous(job, secret, first, f"tcp:{host}:{port}", local)


def _secret(key: bytes) -> str:
    return derive(key, "launchers").hex()


def worker_spec(job: JobSpec, rendezvous: HostRendezvous) -> WorkerSpec:
    """This host's workers, for torch's elastic agent."""
    return WorkerSpec(
        role="default",
        local_world_size=job.num_workers,
        entrypoint=job.command[0],
        args=job.command[1:],
        rdzv_handler=rendezvous,
        max_restarts=job.max_restarts or 0,
        monitor_interval=_MONITOR_S,
        local_addr=rendezvous.local_address,
    )
