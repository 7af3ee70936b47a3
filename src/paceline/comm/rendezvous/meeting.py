"""The ranks of a job meet in a key-value store, learn hosts and addresses, and agree on a secret."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch._C._distributed_c10d import Store

from paceline.comm.rendezvous import pmi
from paceline.comm.rendezvous.environment import ProcessIdentity, who_am_i
from paceline.comm.rendezvous.interfaces import local_address_towards, text_or_empty
from paceline.comm.rendezvous.job_store import Prefixed
from paceline.comm.rendezvous.lost_ranks import LostRanks
from paceline.comm.rendezvous.stores import open_launchers_store, open_store
from paceline.comm.security.keys import derive, job_key
from paceline.errors import CommError, Timeout
from paceline.options import JobOptions
from paceline.types import named

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
    timeout_s: float = 600.0
    """The deadline of the job: seconds after which a rank that is waited for counts as lost."""
    lost_ranks: LostRanks | None = None
    """Exchanged with the launcher, if it is one of ours."""

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
            store=Prefixed(f"{name}/{','.join(map(str, ranks))}", self.store),
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
    host: str | None = None,
    timeout_s: float = 300.0,
) -> Meeting:
    """Meet the other ranks of the job that the environment describes.

    Args:
        environment: The variables that a launcher sets; see `who_am_i` and `JobOptions`.
        host: Name of this rank's host instead of `host_identity()`.
        timeout_s: Seconds to wait for the other ranks, now and later: the deadline of the job.

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
    key = job_key(environment) if identity.size > 1 else secrets.token_bytes(32)
    store = open_store(identity, environment, key, timeout_s)
    store = Prefixed(f"paceline/{_meetings}", store)
    _meetings += 1
    meeting = meet_in_store(
        store,
        identity,
        key=key,
        host=host or host_identity(),
        address=_own_address(identity),
        timeout_s=timeout_s,
        advice="were they started, and can they reach the rendezvous address?",
    )
    if not JobOptions.from_environment(environment).store:
        return meeting
    lost_ranks = LostRanks(open_launchers_store(environment, datetime.timedelta(seconds=timeout_s)))
    if identity.rank == 0:
        lost_ranks.set_deadline(timeout_s)
    return dataclasses.replace(meeting, lost_ranks=lost_ranks)


def meet_in_store(
    store: Store,
    identity: ProcessIdentity,
    *,
    key: bytes,
    host: str,
    address: str,
    timeout_s: float,
    advice: str,
) -> Meeting:
    """Exchange hosts and addresses with the other ranks through `store`; collective.

    The secret of the meeting comes from `key` and from what every rank contributes, so that nothing recorded
    in an earlier meeting can be used again. The store never has it.

    Args:
        store: Holds the keys of this meeting and no others.
        identity: Which of the ranks this one is.
        key: What only processes of this job know.
        host: Name of this rank's host; see `host_identity`.
        address: IP address at which other hosts reach this rank; "" if the job has one host.
        timeout_s: Seconds to wait for the other ranks.
        advice: What to check when a rank does not come: the end of the error's text.

    Raises:
        CommError: Some ranks did not come in time; it names them. Or what is in the store was not written by
            ranks that know `key`.
    """
    card = {"host": host, "address": address, "contribution": secrets.token_hex(16)}
    store.set(f"card/{identity.rank}", json.dumps(card))
    _await_cards(store, identity, timeout_s, advice)
    cards = [json.loads(store.get(f"card/{r}")) for r in range(identity.size)]
    if cards[identity.rank] != card:
        raise CommError(
            f"rank {identity.rank}: another process has written this rank's entry in the rendezvous store;"
            " was a rank started twice, or do two jobs use one rendezvous address?"
        )
    return Meeting(
        identity.rank,
        identity.size,
        identity.local_rank,
        identity.local_size,
        identity.launcher,
        hosts=tuple(c["host"] for c in cards),
        addresses=tuple(c["address"] for c in cards),
        store=store,
        secret=derive(key, "meeting", *(c["contribution"] for c in cards)),
        timeout_s=timeout_s,
    )


def _await_cards(store: Store, identity: ProcessIdentity, timeout_s: float, advice: str) -> None:
    keys = [f"card/{r}" for r in range(identity.size)]
    try:
        store.wait(keys, datetime.timedelta(seconds=timeout_s))
    except RuntimeError as error:
        missing = [r for r, key in enumerate(keys) if not _is_there(store, key)]
        raise CommError(
            f"rank {identity.rank}: {named(missing)} of {identity.size} did not come within {timeout_s:g} s;"
            f" {advice}"
        ) from error


def _is_there(store: Store, key: str) -> bool:
    try:
        return bool(store.check([key]))
    except RuntimeError:  # the store itself has gone
        return False


def host_identity() -> str:
    """Name of this host, equal only for processes that can share memory and reach each other locally.

    Containers and network namespaces of one machine share its boot id. So the name also covers the network
    namespace, the namespace of process ids (shared memory is opened by them) and the device behind /dev/shm.
    """
    parts = [
        text_or_empty(Path("/proc/sys/kernel/random/boot_id")),
        _inode_or_empty(Path("/proc/self/ns/net")),
        _inode_or_empty(Path("/proc/self/ns/pid")),
        _inode_or_empty(Path("/dev/shm")),
    ]
    name = socket.gethostname()
    return f"{name}-{hashlib.sha256('|'.join([name, *parts]).encode()).hexdigest()[:8]}"


def _inode_or_empty(path: Path) -> str:
    return f"{path.stat().st_dev}:{path.stat().st_ino}" if path.exists() else ""


def _own_address(identity: ProcessIdentity) -> str:
    """The local address of the route to the meeting point; "" when all ranks are on this host."""
    if identity.size == identity.local_size or not identity.master_address:
        return ""
    try:
        return local_address_towards(identity.master_address, identity.master_port or 1)
    except OSError:
        return ""
