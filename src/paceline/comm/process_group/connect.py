"""Makes a process group, whose ranks find each other through the store of torch.distributed alone."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore, _DistributedBackendOptions

from paceline import torch_versions
from paceline.comm.native import shared_memory
from paceline.comm.native.communicator import NativeCommunicator
from paceline.comm.process_group import patches
from paceline.comm.process_group.fast_path import FastPathGroup
from paceline.comm.process_group.group import PacelineGroup
from paceline.comm.process_group.membership import NotConnected
from paceline.comm.rendezvous.environment import ProcessIdentity
from paceline.comm.rendezvous.interfaces import address_of, local_address_towards
from paceline.comm.rendezvous.job_store import JobStore
from paceline.comm.rendezvous.meeting import Meeting, host_identity, meet_in_store
from paceline.comm.rendezvous.stores import authentic
from paceline.comm.security.keys import job_key
from paceline.errors import CommError


def create(options: _DistributedBackendOptions, backend_options: object) -> PacelineGroup:
    """Make the process group that `torch.distributed` asked for; collective over its members.

    Args:
        options: Torch's description of the group.
        backend_options: What the user passed as `pg_options`; used for the group's NCCL backend, if any.
    """
    patches.apply()
    torch_versions.warn_if_newer()
    timeout_s, rank, size = options.timeout.total_seconds(), options.group_rank, options.group_size
    comm: NativeCommunicator | NotConnected
    if getattr(options, "enable_reconfigure", False):
        comm = NotConnected(rank, size)
    else:
        comm = join(options.store, rank, size, timeout_s)
    group = FastPathGroup(comm, options.store, timeout_s=timeout_s, join=join)
    if torch.cuda.is_available() and dist.is_nccl_available():
        nccl = group.other_backends["cuda"] = _nccl(options, backend_options)
        if torch_versions.HAS_PYTHON_BACKENDS:
            kind = dist.ProcessGroup.BackendType.NCCL
            group._register_backend(torch.device("cuda"), kind, nccl)  # noqa: SLF001  torch's name for it
    return group


def join(store: Store, rank: int, size: int, timeout_s: float) -> NativeCommunicator:
    """Connect the ranks that meet in `store`; collective among them."""
    return shared_memory.connect(meet(store, rank, size, timeout_s), timeout_s=timeout_s)


def _nccl(options: _DistributedBackendOptions, given: object) -> Any:
    """The group's backend for CUDA tensors ("cpu:paceline,cuda:nccl"); it connects when it is first used."""
    nccl: Any = dist.ProcessGroupNCCL  # a build of torch without NCCL does not have it
    chosen = given if isinstance(given, nccl.Options) else nccl.Options()
    chosen._timeout = options.timeout  # noqa: SLF001  torch has no public name for it
    chosen.global_ranks_in_group = options.global_ranks_in_group
    chosen.group_name = options.group_id
    return nccl(PrefixStore("cuda", options.store), options.group_rank, options.group_size, chosen)


def meet(store: Store, rank: int, size: int, timeout_s: float) -> Meeting:
    """Exchange hosts, addresses and a secret of this group alone with its other members; collective.

    The keys include how many times this rank has joined, because a group may be made again on the same store
    after it was destroyed. Raises CommError naming the ranks that did not come within `timeout_s`.
    """
    count = store.add(f"joins/{rank}", 1)
    key = job_key(os.environ)
    met = meet_in_store(
        authentic(PrefixStore(f"paceline/{count}", store), key),
        ProcessIdentity(rank, size, local_rank=0, local_size=1, launcher="torch.distributed"),
        key=key,
        host=host_identity(),
        address=own_address(store),
        timeout_s=timeout_s,
        advice="are they alive, and do they make the same groups in the same order?",
    )
    return dataclasses.replace(met, local_size=met.hosts.count(met.hosts[rank]))


def own_address(store: Store) -> str:
    """Address at which other hosts reach this rank: of GLOO_SOCKET_IFNAME, else of the route to the store."""
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if interface:
        address = address_of(interface)
        if address is None:
            raise CommError(
                f"GLOO_SOCKET_IFNAME={interface}: this host has no such interface, or it has no address"
            )
        return address
    base: Store = store
    while isinstance(base, PrefixStore):
        base = base.underlying_store
    host, port = os.environ.get("MASTER_ADDR"), 1
    if isinstance(base, TCPStore):
        host, port = base.host, base.port
    elif isinstance(base, JobStore):
        host = base.host
    if not host:
        return ""
    try:
        return local_address_towards(host, port)
    except OSError:
        return ""
