"""The ranks of a job meet in a key-value store and learn hosts, addresses and the job's secret."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
import socket
import stat
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, HashStore, PrefixStore, Store, TCPStore

from paceline.comm.rendezvous import pmi
from paceline.comm.rendezvous.environment import ProcessIdentity, who_am_i
from paceline.comm.rendezvous.interfaces import local_address_towards
from paceline.errors import CommError, ConfigError, Timeout
from paceline.options import new_secret

_MPI_LAUNCHERS = ("mpirun", "mpiexec", "orted", "orterun", "prte", "hydra_", "pmi_proxy", "slurmstepd")
_meetings = 0


@dataclasses.dataclass(frozen=True)
class Meeting:
    """What a fabric needs to connect the ranks of one job."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    launcher: str
    hosts: tuple[str, ...]
    """hosts[r]: name of rank r's host; ranks with equal names share memory."""
    addresses: tuple[str, ...]
    """addresses[r]: an IP address at which the others reach rank r; "" when the job has one host."""
    store: Store
    secret: bytes

    @property
    def address(self) -> str:
        """This rank's own address."""
        return self.addresses[self.rank]

    def part(self, name: str, ranks: Sequence[int]) -> Meeting:
        """The meeting of some of the ranks, in that order; all of them give the same `name`."""
        return dataclasses.replace(
            self,
            rank=list(ranks).index(self.rank),
            size=len(ranks),
            hosts=tuple(self.hosts[r] for r in ranks),
            addresses=tuple(self.addresses[r] for r in ranks),
            store=PrefixStore(f"{name}/{','.join(map(str, ranks))}", self.store),
        )

    def exchange(self, key: str, own: object, *, timeout_s: float) -> list[Any]:
        """Return every rank's value, in rank order; collective.

        Args:
            key: Where the values are kept; use each key once per job.
            own: This rank's value: anything that JSON can carry.
            timeout_s: Seconds to wait for each rank.

        Raises:
            Timeout: naming a rank that did not come.
        """
        self.store.set(f"{key}/{self.rank}", json.dumps(own))
        return [json.loads(self.read(f"{key}/{r}", r, timeout_s=timeout_s)) for r in range(self.size)]

    def read(self, key: str, rank: int, *, timeout_s: float) -> bytes:
        """Wait for what `rank` writes under `key`, and return it; Timeout names the rank."""
        deadline = time.monotonic() + timeout_s
        pause_s = 0.0005
        while not self.store.check([key]):
            if time.monotonic() > deadline:
                raise Timeout(
                    f"rank {self.rank}: rank {rank} (host {self.hosts[rank]}) did not join within"
                    f" {timeout_s:g} s ({key}); is it alive, and does it run the same script?"
                )
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.02)
        return bytes(self.store.get(key))


def meet(
    environment: Mapping[str, str] = os.environ,
    *,
    secret: str = "",
    host: str | None = None,
    timeout_s: float = 300.0,
) -> Meeting:
    """Meet the other ranks of the job that the environment describes.

    Args:
        environment: The variables that a launcher sets; see `who_am_i`.
        secret: The job's secret from the launcher, in hexadecimal. Without one, rank 0 makes it and the store
            carries it.
        host: Name of this rank's host instead of `host_identity()`.
        timeout_s: Seconds to wait for the other ranks.

    Raises:
        ConfigError: The environment does not say where to meet.
        CommError: Some ranks did not come in time; it names them.
    """
    global _meetings  # noqa: PLW0603  each meeting of a process needs fresh keys; all ranks count alike
    identity = who_am_i(environment)
    if identity.launcher == "mpich":
        pmi.abort_on_exception(environment)
        if identity.local_size < identity.size and not identity.master_address:
            identity = pmi.agree_on_master(identity, environment, timeout_s)
    store = PrefixStore(f"paceline/{_meetings}", _open_store(identity, environment, timeout_s))
    _meetings += 1
    return meet_in_store(
        store,
        identity,
        host=host or host_identity(),
        address=_own_address(identity),
        secret=secret,
        timeout_s=timeout_s,
        advice="were they started, and can they reach the rendezvous address?",
    )


def meet_in_store(
    store: Store,
    identity: ProcessIdentity,
    *,
    host: str,
    address: str,
    secret: str = "",
    timeout_s: float,
    advice: str,
) -> Meeting:
    """Exchange hosts, addresses and the secret with the other ranks through `store`; collective.

    Args:
        store: Holds the keys of this meeting and no others.
        identity: Which of the ranks this one is.
        host: Name of this rank's host; see `host_identity`.
        address: IP address at which other hosts reach this rank; "" if the job has one host.
        secret: The job's secret, in hexadecimal; "" on all ranks if rank 0 is to make one.
        timeout_s: Seconds to wait for the other ranks.
        advice: What to check when a rank does not come: the end of the error's text.

    Raises:
        ConfigError: Some ranks have a secret and others have none.
        CommError: Some ranks did not come in time; it names them.
    """
    card = {"host": host, "address": address, "has_secret": bool(secret)}
    if identity.rank == 0 and not secret:
        store.set("secret", new_secret())  # before the card: who sees the card finds the secret
    store.set(f"card/{identity.rank}", json.dumps(card))
    _await_cards(store, identity, timeout_s, advice)
    cards = [json.loads(store.get(f"card/{r}")) for r in range(identity.size)]
    _check_secrets(identity, [bool(c["has_secret"]) for c in cards])
    return Meeting(
        identity.rank,
        identity.size,
        identity.local_rank,
        identity.local_size,
        identity.launcher,
        hosts=tuple(c["host"] for c in cards),
        addresses=tuple(c["address"] for c in cards),
        store=store,
        secret=bytes.fromhex(secret or store.get("secret").decode()),
    )


def _await_cards(store: Store, identity: ProcessIdentity, timeout_s: float, advice: str) -> None:
    keys = [f"card/{r}" for r in range(identity.size)]
    try:
        store.wait(keys, datetime.timedelta(seconds=timeout_s))
    except RuntimeError as error:
        missing = [r for r, key in enumerate(keys) if not _is_there(store, key)]
        raise CommError(
            f"rank {identity.rank}: ranks {missing} of {identity.size} did not come within {timeout_s:g} s;"
            f" {advice}"
        ) from error


def _is_there(store: Store, key: str) -> bool:
    try:
        return bool(store.check([key]))
    except RuntimeError:  # the store itself has gone
        return False


def _check_secrets(identity: ProcessIdentity, given: list[bool]) -> None:
    if any(given) and not all(given):
        without = [r for r, has_secret in enumerate(given) if not has_secret]
        raise ConfigError(
            f"rank {identity.rank}: ranks {without} of {identity.size} were started without the job's secret,"
            " the others with it; start all of them by the same launcher"
        )


def host_identity() -> str:
    """Name of this host, equal only for processes that can share memory and reach each other locally.

    Containers and network namespaces of one machine share its boot id. So the name also covers the network
    namespace, the namespace of process ids (shared memory is opened by them) and the device behind /dev/shm.
    """
    parts = [
        _text_or_empty(Path("/proc/sys/kernel/random/boot_id")),
        _inode_or_empty(Path("/proc/self/ns/net")),
        _inode_or_empty(Path("/proc/self/ns/pid")),
        _inode_or_empty(Path("/dev/shm")),
    ]
    name = socket.gethostname()
    return f"{name}-{hashlib.sha256('|'.join([name, *parts]).encode()).hexdigest()[:8]}"


def _text_or_empty(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _inode_or_empty(path: Path) -> str:
    return f"{path.stat().st_dev}:{path.stat().st_ino}" if path.exists() else ""


def _open_store(identity: ProcessIdentity, environment: Mapping[str, str], timeout_s: float) -> Store:
    timeout = datetime.timedelta(seconds=timeout_s)
    if dist.is_initialized():
        return dist.distributed_c10d._get_default_store()  # noqa: SLF001  torch offers no public one
    if identity.size == 1:
        return HashStore()
    try:
        if identity.launcher == "torchrun":
            return _torchrun_store(identity, environment, timeout)
        if identity.master_address and identity.master_port:
            return TCPStore(
                identity.master_address,
                identity.master_port,
                None,
                identity.rank == 0,
                timeout,
                wait_for_workers=False,
            )
    except RuntimeError as error:
        where = f"{identity.master_address}:{identity.master_port}"
        raise CommError(f"rank {identity.rank}: no rendezvous at {where}: {error}") from error
    if identity.local_size == identity.size:
        return FileStore(str(_meeting_file(identity)), identity.size)
    raise ConfigError(
        f"rank {identity.rank}: {identity.launcher} started {identity.size} ranks on several hosts but does"
        " not say where to meet: export MASTER_ADDR (host of rank 0) and MASTER_PORT to every rank"
    )


def _torchrun_store(
    identity: ProcessIdentity, environment: Mapping[str, str], timeout: datetime.timedelta
) -> Store:
    if not identity.master_address or not identity.master_port:
        raise ConfigError("RANK and WORLD_SIZE are set but MASTER_ADDR or MASTER_PORT is not")
    agent_has_store = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = TCPStore(
        identity.master_address,
        identity.master_port,
        None,
        identity.rank == 0 and not agent_has_store,
        timeout,
        wait_for_workers=False,
        multi_tenant=True,
    )
    # The agent's store outlives a restart of the workers: keys of an earlier attempt must not be found.
    return PrefixStore(f"attempt_{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _own_address(identity: ProcessIdentity) -> str:
    """The local address of the route to the meeting point; "" when all ranks are on this host."""
    if identity.size == identity.local_size or not identity.master_address:
        return ""
    try:
        return local_address_towards(identity.master_address, identity.master_port or 1)
    except OSError:
        return ""


def _meeting_file(identity: ProcessIdentity) -> Path:
    """The file in which the ranks of one single-host MPI job meet, in a folder of this user alone."""
    folder = Path(tempfile.gettempdir()) / f"paceline-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or not stat.S_ISDIR(status.st_mode) or status.st_mode & 0o077:
        raise ConfigError(f"{folder} must be a directory of this user with mode 700; remove it")
    return folder / f"meet-{_launcher_process()}-{identity.size}"


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
