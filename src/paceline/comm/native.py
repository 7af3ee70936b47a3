"""The native fabric: ranks of one host exchange tensors through shared memory, driven by the C++ core.

Buffers from `allocate` lie in shared memory, so peers read and write them in place; private tensors go
through cache-sized stages. Nothing is ever named in the file system: memory disappears with its last user.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

import torch

from paceline import _core
from paceline.comm.native_core import CoreCommunicator, engine
from paceline.comm.native_network import NetworkCommunicator, connect_hosts
from paceline.comm.rendezvous import Meeting
from paceline.errors import ConfigError, Timeout
from paceline.types import Rank


def connect(
    meeting: Meeting, *, timeout_s: float, device: torch.device | None = None
) -> NativeCommunicator | NetworkCommunicator:
    """Join the job's ranks: through shared memory on one host, over TCP between hosts.

    `timeout_s` is the deadline of every operation. Raises ConfigError for other devices than the CPU and when
    ranks cannot open each other's memory, Timeout naming the ranks that did not come.
    """
    if device is not None and device.type != "cpu":
        raise ConfigError(f"the native fabric moves CPU tensors, got device {device}; use fabric='torch'")
    if len(set(meeting.hosts)) > 1:
        return connect_hosts(meeting, timeout_s=timeout_s)
    core = engine()
    core.set_ranks_on_host(meeting.size)
    group = _core.Group(core, meeting.rank, meeting.size)
    meeting.store.set(f"native/{meeting.rank}", json.dumps(group.address))
    addresses = [_address_of(meeting, r, timeout_s) for r in range(meeting.size)]
    group.connect(addresses)
    comm = NativeCommunicator(meeting.rank, meeting.hosts, group, timeout_s=timeout_s)
    comm.meeting = meeting
    comm.ledger.wire_bytes = 0  # nothing leaves the host
    comm.barrier().wait()  # from here on everybody's memory is open: nobody depends on the store any more
    return comm


def _address_of(meeting: Meeting, rank: Rank, timeout_s: float) -> _core.Address:
    key = f"native/{rank}"
    deadline = time.monotonic() + timeout_s
    while not meeting.store.check([key]):
        if time.monotonic() > deadline:
            raise Timeout(
                f"rank {meeting.rank}: rank {rank} (host {meeting.hosts[rank]}) did not join the native"
                f" fabric within {timeout_s:g} s; is it alive, and was fabric='native' chosen there too?"
            )
        time.sleep(0.002)
    pid, fd, slot, generation, offset = json.loads(meeting.store.get(key))
    return pid, fd, slot, generation, offset


class NativeCommunicator(CoreCommunicator):
    """A communicator over one shared-memory group."""

    def __init__(self, rank: Rank, hosts: Sequence[str], group: _core.Group, *, timeout_s: float) -> None:
        super().__init__(rank, hosts, group, timeout_s=timeout_s)

    def _split(self, ranks: list[Rank]) -> NativeCommunicator | None:
        group = None
        mine = torch.zeros(5, dtype=torch.int64)
        if self.rank in ranks:
            group = _core.Group(engine(), ranks.index(self.rank), len(ranks))
            mine = torch.tensor(group.address, dtype=torch.int64)
        everyone = torch.empty(5 * self.size, dtype=torch.int64)
        self._all_gather(everyone, mine).wait()
        if group is None:
            return None
        rows = everyone.view(self.size, 5).tolist()
        group.connect([tuple(rows[r]) for r in ranks])
        return NativeCommunicator(
            ranks.index(self.rank), [self.hosts[r] for r in ranks], group, timeout_s=self.timeout_s
        )
