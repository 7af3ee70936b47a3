"""The store in which the ranks of a job meet, by who started them.

our launchers           the launcher's store, whose address and key they give to every rank
one host, foreign       a Unix socket in this account's private folder; rank 0 serves it
several hosts, MPI, srun    an authenticated store of rank 0 at its address
several hosts, torchrun     torchrun's own store, with signed values: strangers can write there
"""

from __future__ import annotations

import atexit
import datetime
import hashlib
import ipaddress
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore

from paceline.comm.rendezvous.environment import ProcessIdentity
from paceline.comm.rendezvous.interfaces import listening_address
from paceline.comm.rendezvous.job_store import JobStore, Prefixed
from paceline.comm.rendezvous.signed_store import SignedStore
from paceline.comm.rendezvous.store_server import StoreServer
from paceline.comm.security.keys import derive
from paceline.comm.security.private_folder import private_folder
from paceline.errors import CommError, ConfigError
from paceline.options import JobOptions

_MPI_LAUNCHERS = ("mpirun", "mpiexec", "orted", "orterun", "prte", "hydra_", "pmi_proxy", "slurmstepd")
_LINGER_S = 5.0
# One connection for all meetings of this process.
_torch_stores: dict[tuple[str, int, bool], TCPStore] = {}
_servers: dict[str, StoreServer] = {}
# Kept, because torch's groups hold only the C++ half of a store.
_clients: dict[tuple[str, bytes, datetime.timedelta], JobStore] = {}


def open_store(
    identity: ProcessIdentity, environment: Mapping[str, str], key: bytes, timeout_s: float
) -> Store:
    """The store of the job that started this rank. Meetings of one process share it.

    Args:
        identity: Which of the ranks this one is.
        environment: The variables that the launcher set.
        key: What only processes of this job know.
        timeout_s: Seconds to wait for the store, and later for missing keys.

    Raises:
        CommError: The store cannot be reached.
        ConfigError: The environment does not say where to meet.
    """
    timeout = datetime.timedelta(seconds=timeout_s)
    options = JobOptions.from_environment(environment)
    try:
        if dist.is_initialized():
            # torch offers no public name for the store of the default group.
            return authentic(dist.distributed_c10d._get_default_store(), key)  # noqa: SLF001
        if identity.size == 1:
            return HashStore()
        if options.store:
            return open_launchers_store(environment, timeout)
        if identity.launcher == "torchrun" and environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = _torch_store(identity, timeout, is_server=False)
            return Prefixed(_attempt(environment), authentic(store, key))
        if _is_one_host(identity):
            return _own_store(identity, key, timeout)
        if identity.launcher == "torchrun":
            return authentic(_torch_store(identity, timeout, is_server=identity.rank == 0), key)
        return _rank_0_store(identity, key, timeout)
    except RuntimeError as error:
        where = options.store or f"{identity.master_address}:{identity.master_port}"
        raise CommError(f"rank {identity.rank}: no rendezvous at {where}: {error}") from error


def open_launchers_store(environment: Mapping[str, str], timeout: datetime.timedelta) -> Store:
    """The store that our launcher serves, whose address and key it gave to this process."""
    options = JobOptions.from_environment(environment)
    store = _client(options.store, bytes.fromhex(options.secret), timeout)
    return Prefixed(_attempt(environment), store)


def attempt_name(number: int | str) -> str:
    """Stores outlive a restart of the workers: keys of an earlier attempt must not be found."""
    return f"attempt_{number}"


def _attempt(environment: Mapping[str, str]) -> str:
    return attempt_name(environment.get("TORCHELASTIC_RESTART_COUNT", "0"))


def authentic(store: Store, key: bytes) -> Store:
    """`store` itself if only processes with the job's key can reach it, else with signed values."""
    base = store
    while isinstance(base, PrefixStore):
        base = base.underlying_store
    return store if isinstance(base, JobStore | HashStore) else SignedStore(store, derive(key, "signatures"))


def _client(address: str, key: bytes, timeout: datetime.timedelta) -> JobStore:
    found = (address, key, timeout)
    if found not in _clients:
        _clients[found] = JobStore(address, key, timeout)
    return _clients[found]


def _is_one_host(identity: ProcessIdentity) -> bool:
    if identity.local_size == identity.size:
        return True
    address = identity.master_address or ""
    try:
        return address == "localhost" or ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _own_store(identity: ProcessIdentity, key: bytes, timeout: datetime.timedelta) -> Store:
    """The ranks of one host meet at a socket whose name follows from what their launcher told them."""
    if identity.launcher == "torchrun":
        if not identity.master_port:
            raise ConfigError("RANK and WORLD_SIZE are set but MASTER_PORT is not")
        job = f"port-{identity.master_port}"
    else:
        job = f"{_launcher_process()}-{identity.size}"
    namespace = Path("/proc/self/ns/net")
    inode = namespace.stat().st_ino if namespace.exists() else 0
    name = hashlib.sha256(f"{job}-{inode}".encode()).hexdigest()[:24]
    if identity.rank == 0:
        _serve(name, lambda: StoreServer(key, name=name))
    return _client(f"unix:{private_folder() / f'store-{name}'}", key, timeout)


def _rank_0_store(identity: ProcessIdentity, key: bytes, timeout: datetime.timedelta) -> Store:
    if not identity.master_address or not identity.master_port:
        raise ConfigError(
            f"rank {identity.rank}: {identity.launcher} started {identity.size} ranks on several hosts but"
            " does not say where to meet: export MASTER_ADDR (host of rank 0) and MASTER_PORT to every rank"
        )
    host, port = identity.master_address, identity.master_port
    if identity.rank == 0:
        _serve(f"{host}:{port}", lambda: StoreServer(key, host=listening_address(host), port=port))
    return _client(f"tcp:{host}:{port}", key, timeout)


def _torch_store(identity: ProcessIdentity, timeout: datetime.timedelta, *, is_server: bool) -> TCPStore:
    if not identity.master_address or not identity.master_port:
        raise ConfigError("RANK and WORLD_SIZE are set but MASTER_ADDR or MASTER_PORT is not")
    found = (identity.master_address, identity.master_port, is_server)
    if found not in _torch_stores:
        _torch_stores[found] = TCPStore(
            *found[:2], None, is_server, timeout, wait_for_workers=False, multi_tenant=True
        )
    return _torch_stores[found]


def _serve(name: str, make: Callable[[], StoreServer]) -> None:
    """Serve a store until this process ends; meetings of one process share it."""
    if name in _servers:
        return
    _servers[name] = make()
    if len(_servers) == 1:
        atexit.register(_close_servers, os.getpid())


def _close_servers(pid: int) -> None:
    """Rank 0 ends: the others may still have something to ask."""
    if os.getpid() != pid:
        return
    for client in _clients.values():
        client.close()
    deadline = time.monotonic() + _LINGER_S
    while any(server.num_clients for server in _servers.values()) and time.monotonic() < deadline:
        time.sleep(0.02)
    for server in _servers.values():
        server.close()


def _launcher_process() -> str:
    """Process id and start time of the MPI launcher above this process; of its parent if there is none."""
    pid = os.getppid()
    fallback = f"{pid}-{_status(pid)[1]}"
    while pid > 1:
        name, started, parent = _status(pid)
        if name.startswith(_MPI_LAUNCHERS):
            return f"{pid}-{started}"
        pid = parent
    return fallback


def _status(pid: int) -> tuple[str, str, int]:
    """Name, start time and parent of a process."""
    text = Path(f"/proc/{pid}/stat").read_text()
    name = text[text.index("(") + 1 : text.rindex(")")]
    fields = text[text.rindex(")") + 2 :].split()
    return name, fields[19], int(fields[1])
