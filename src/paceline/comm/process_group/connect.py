"""How the ranks of a new group find each other: through the store that torch.distributed hands over, only."""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import socket
import struct
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from paceline.comm.native import shared_memory
from paceline.comm.rendezvous.meeting import Meeting, host_identity
from paceline.errors import CommError
from paceline.options import new_secret

if TYPE_CHECKING:
    from paceline.comm.process_group.group import PacelineGroup

_SIOCGIFADDR = 0x8915


def create(options: Any, backend_options: Any) -> PacelineGroup:
    """Make the process group that `torch.distributed` asked for; collective over its members."""
    from paceline.comm.process_group import patches
    from paceline.comm.process_group.fast_path import QuickGroup
    from paceline.comm.process_group.group import PacelineGroup

    patches.apply()
    rank, size = options.group_rank, options.group_size
    timeout_s = options.timeout.total_seconds()
    meeting = meet(options.store, rank, size, timeout_s)
    comm = shared_memory.connect(meeting, timeout_s=timeout_s)
    quick = isinstance(comm, shared_memory.NativeCommunicator)
    group = (QuickGroup if quick else PacelineGroup)(comm, options.store, timeout_s=timeout_s)  # type: ignore[arg-type]
    if torch.cuda.is_available() and dist.is_nccl_available():
        group.other_backends["cuda"] = _nccl(options, backend_options)
    return group


def _nccl(options: Any, given: Any) -> Any:
    """The group's backend for CUDA tensors ("cpu:paceline,cuda:nccl"); it connects when it is first used."""
    nccl: Any = dist.ProcessGroupNCCL
    chosen = given if isinstance(given, nccl.Options) else nccl.Options()
    chosen._timeout = options.timeout
    chosen.global_ranks_in_group = options.global_ranks_in_group
    chosen.group_name = options.group_id
    return nccl(PrefixStore("cuda", options.store), options.group_rank, options.group_size, chosen)


def meet(store: Store, rank: int, size: int, timeout_s: float) -> Meeting:
    """Exchange hosts, addresses and a secret that is this group's own.

    Keys carry how often this rank has joined, because a group may be made again on the same store after it
    was destroyed. Raises CommError naming the ranks that did not come within `timeout_s`.
    """
    join = store.add(f"joins/{rank}", 1)
    store = PrefixStore(f"paceline/{join}", store)
    card = {"host": host_identity(), "address": own_address(store)}
    store.set(f"card/{rank}", json.dumps(card))
    if rank == 0:
        store.set("secret", new_secret())
    keys = [f"card/{r}" for r in range(size)] + ["secret"]
    wait_for(store, keys, timeout_s, rank)
    cards = [json.loads(store.get(key)) for key in keys[:-1]]
    return Meeting(
        rank=rank,
        size=size,
        local_rank=0,
        local_size=sum(c["host"] == card["host"] for c in cards),
        launcher="torch.distributed",
        hosts=tuple(c["host"] for c in cards),
        addresses=tuple(c["address"] for c in cards),
        store=store,
        secret=bytes.fromhex(store.get("secret").decode()),
    )


def wait_for(store: Store, keys: list[str], timeout_s: float, rank: int) -> None:
    """Wait for the keys "…/<rank>" of all members; CommError names the members whose key is missing."""
    try:
        store.wait(keys, datetime.timedelta(seconds=timeout_s))
    except RuntimeError as error:
        missing = [_last(key) for key in keys if not _is_there(store, key)]
        raise CommError(
            f"rank {rank}: new group: ranks {', '.join(missing)} did not come within {timeout_s:g} s; do they"
            " live, and do they make the same groups in the same order?"
        ) from error


def _last(key: str) -> str:
    return key.rsplit("/", 1)[-1]


def _is_there(store: Store, key: str) -> bool:
    try:
        return bool(store.check([key]))
    except RuntimeError:
        return False


def own_address(store: Store) -> str:
    """Address at which other hosts reach this rank: of GLOO_SOCKET_IFNAME, else of the route to the store."""
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if interface:
        return _address_of_interface(interface)
    base: Store = store
    while isinstance(base, PrefixStore):
        base = base.underlying_store
    target = (base.host, base.port) if isinstance(base, TCPStore) else (os.environ.get("MASTER_ADDR", ""), 1)
    if not target[0]:
        return ""
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(*target, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(where)  # a datagram socket: nothing is sent
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def _address_of_interface(name: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            packed = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        except OSError as error:
            raise CommError(f"GLOO_SOCKET_IFNAME={name}: this host has no such interface: {error}") from error
    return socket.inet_ntoa(packed[20:24])
