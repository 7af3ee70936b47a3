"""Where is everybody? Ranks meet in a key-value store and learn each other's hosts and the job's secret."""

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
from paceline.comm.rendezvous.environment import Placement, who_am_i
from paceline.errors import CommError, ConfigError, Timeout
from paceline.options import new_secret

_LAUNCHERS = ("mpirun", "mpiexec", "orted", "orterun", "prte", "hydra_", "pmi_proxy", "slurmstepd")
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
    """hosts[r]: name of rank r's host; equal strings share memory."""
    addresses: tuple[str, ...]
    """addresses[r]: an IP address at which the others reach rank r; "" when the job has one host."""
    store: Store
    secret: bytes

    @property
    def address(self) -> str:
        """This rank's own address."""
        return self.addresses[self.rank]

    def part(self, name: str, ranks: Sequence[int]) -> Meeting:
        """Where some of the ranks meet, in that order; all of them give the same `name`."""
        return dataclasses.replace(
            self,
            rank=list(ranks).index(self.rank),
            size=len(ranks),
            hosts=tuple(self.hosts[r] for r in ranks),
            addresses=tuple(self.addresses[r] for r in ranks),
            store=PrefixStore(f"{name}/{','.join(map(str, ranks))}", self.store),
        )

    def exchange(self, key: str, own: Any, *, timeout_s: float) -> list[Any]:
        """Every rank's plain value (JSON), through the store; collective, `key` once per job.

        Raises Timeout naming a rank that did not come.
        """
        self.store.set(f"{key}/{self.rank}", json.dumps(own))
        return [json.loads(self.read(f"{key}/{r}", r, timeout_s=timeout_s)) for r in range(self.size)]

    def read(self, key: str, rank: int, *, timeout_s: float) -> bytes:
        """Return what `rank` wrote under `key` once it is there; Timeout names the rank."""
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

    `secret` (hex) comes from the launcher; without one rank 0 makes it and the store carries it. `host`
    overrides this rank's host identity. Raises ConfigError when the environment does not say where to meet,
    CommError naming the ranks that did not come within `timeout_s`.
    """
    global _meetings  # noqa: PLW0603  each meeting of a process needs fresh keys; all ranks count alike
    place = who_am_i(environment)
    if place.launcher == "mpich":
        pmi.abort_on_exception(environment)
        if place.local_size < place.size and not place.master_address:
            place = pmi.agree_where(place, environment, timeout_s)
    store = PrefixStore(f"paceline/{_meetings}", _open_store(place, environment, timeout_s))
    _meetings += 1
    address = _own_address(place)
    card = {"host": host or host_identity(), "address": address, "has_secret": bool(secret)}
    if place.rank == 0 and not secret:
        store.set("secret", new_secret())
    store.set(f"card/{place.rank}", json.dumps(card))
    _await_cards(store, place, timeout_s)
    cards = [json.loads(store.get(f"card/{r}")) for r in range(place.size)]
    _check_secrets(place, [bool(c["has_secret"]) for c in cards])
    return Meeting(
        place.rank,
        place.size,
        place.local_rank,
        place.local_size,
        place.launcher,
        hosts=tuple(c["host"] for c in cards),
        addresses=tuple(c["address"] for c in cards),
        store=store,
        secret=bytes.fromhex(secret or store.get("secret").decode()),
    )


def _check_secrets(place: Placement, given: list[bool]) -> None:
    if any(given) and not all(given):
        without = [r for r, has in enumerate(given) if not has]
        raise ConfigError(
            f"rank {place.rank}: ranks {without} of {place.size} were started without the job's secret, the"
            " others with it; start all of them by the same launcher"
        )


def host_identity() -> str:
    """Name of this host, equal only for processes that can share memory and reach each other locally.

    Containers and network namespaces of one machine share its boot id, so the network namespace, the
    namespace of process ids (shared memory is opened by them) and the device behind /dev/shm take part.
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


def _await_cards(store: Store, place: Placement, timeout_s: float) -> None:
    try:
        store.wait([f"card/{r}" for r in range(place.size)], datetime.timedelta(seconds=timeout_s))
    except RuntimeError as error:
        missing = [r for r in range(place.size) if not store.check([f"card/{r}"])]
        raise CommError(
            f"rank {place.rank}: ranks {missing} of {place.size} did not come within {timeout_s:g} s;"
            " were they started, and can they reach the rendezvous address?"
        ) from error


def _open_store(place: Placement, environment: Mapping[str, str], timeout_s: float) -> Store:
    timeout = datetime.timedelta(seconds=timeout_s)
    if dist.is_initialized():
        return dist.distributed_c10d._get_default_store()
    if place.size == 1:
        return HashStore()
    try:
        if place.launcher == "torchrun":
            return _torchrun_store(place, environment, timeout)
        if place.master_address and place.master_port:
            return TCPStore(
                place.master_address,
                place.master_port,
                None,
                place.rank == 0,
                timeout,
                wait_for_workers=False,
            )
    except RuntimeError as error:
        where = f"{place.master_address}:{place.master_port}"
        raise CommError(f"rank {place.rank}: no rendezvous at {where}: {error}") from error
    if place.local_size == place.size:
        return FileStore(str(_meeting_file(place)), place.size)
    raise ConfigError(
        f"rank {place.rank}: {place.launcher} started {place.size} ranks on several hosts but does not"
        " say where to meet: export MASTER_ADDR (host of rank 0) and MASTER_PORT to every rank"
    )


def _torchrun_store(place: Placement, environment: Mapping[str, str], timeout: datetime.timedelta) -> Store:
    if not place.master_address or not place.master_port:
        raise ConfigError("RANK and WORLD_SIZE are set but MASTER_ADDR or MASTER_PORT is not")
    agent = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = TCPStore(
        place.master_address,
        place.master_port,
        None,
        place.rank == 0 and not agent,
        timeout,
        wait_for_workers=False,
        multi_tenant=True,
    )
    # The agent's store outlives a restart of the workers: keys of an earlier attempt must not be found.
    return PrefixStore(f"attempt_{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _own_address(place: Placement) -> str:
    """The local address of the route to the meeting point; "" when all ranks are on this host."""
    if place.size == place.local_size or not place.master_address:
        return ""
    try:
        found = socket.getaddrinfo(place.master_address, place.master_port or 1, type=socket.SOCK_DGRAM)
        family, kind, protocol, _, target = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)  # a datagram socket: nothing is sent
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def _meeting_file(place: Placement) -> Path:
    """A file that the ranks of one single-host MPI job agree on, in a folder that only this user can use."""
    folder = Path(tempfile.gettempdir()) / f"paceline-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or not stat.S_ISDIR(status.st_mode) or status.st_mode & 0o077:
        raise ConfigError(f"{folder} must be a directory of this user with mode 700; remove it")
    return folder / f"meet-{_launcher_process()}-{place.size}"


def _launcher_process() -> str:
    """Process id and start time of the MPI launcher above this process (its parent if none is known)."""
    pid = os.getppid()
    fallback = f"{pid}-{_status(pid)[1]}"
    while pid > 1:
        name, started, parent = _status(pid)
        if name.startswith(_LAUNCHERS):
            return f"{pid}-{started}"
        pid = parent
    return fallback


def _status(pid: int) -> tuple[str, str, int]:
    text = Path(f"/proc/{pid}/stat").read_text()
    name, rest = text[text.index("(") + 1 : text.rindex(")")], text[text.rindex(")") + 2 :].split()
    return name, rest[19], int(rest[1])
