"""The native fabric: ranks of one host exchange tensors through shared memory, driven by the C++ core.

Buffers from `allocate` lie in shared memory, so peers read and write them in place; private tensors go
through cache-sized stages. Nothing is ever named in the file system: memory disappears with its last user.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import NoReturn

import torch

from paceline import _core
from paceline.comm.native.choosing import ChoosingCommunicator
from paceline.comm.native.codes import OP_CODES
from paceline.comm.native.communicator import engine
from paceline.comm.native.hierarchical import MixedCommunicator, with_shared_memory
from paceline.comm.native.network import NetworkCommunicator, connect_hosts
from paceline.comm.native.select import Choice, check_operation
from paceline.comm.native.work import DONE
from paceline.comm.rendezvous.meeting import Meeting
from paceline.errors import CommError, ConfigError
from paceline.types import Rank, ReduceOp, Work


def connect(
    meeting: Meeting, *, timeout_s: float, device: torch.device | None = None
) -> NativeCommunicator | NetworkCommunicator | MixedCommunicator:
    """Join the job's ranks: through shared memory within a host, over TCP between hosts.

    `timeout_s` is the deadline of every operation. Raises ConfigError for other devices than the CPU and when
    ranks cannot open each other's memory, Timeout naming the ranks that did not come.
    """
    if device is not None and device.type != "cpu":
        raise ConfigError(f"the native fabric moves CPU tensors, got device {device}; use fabric='torch'")
    if len(set(meeting.hosts)) > 1:
        return with_shared_memory(connect_hosts(meeting, timeout_s=timeout_s))
    core = engine()
    core.set_ranks_on_host(meeting.size)
    group = _core.Group(core, meeting.rank, meeting.size)
    addresses = meeting.exchange("native", group.address, timeout_s=timeout_s)
    refusal = ""
    try:
        group.connect([tuple(address) for address in addresses])
    except ConfigError as error:
        refusal = str(error)
    refusals = meeting.exchange("native/opened", refusal, timeout_s=timeout_s)
    if any(refusals):
        group.close()
        return _without_shared_memory(meeting, refusals, timeout_s)
    comm = NativeCommunicator(meeting.rank, meeting.hosts, group, timeout_s=timeout_s)
    comm.meeting = comm._home = meeting
    comm.ledger.wire_bytes = 0  # nothing leaves the host
    comm.barrier().wait()  # nobody depends on the store any more
    return comm


def _without_shared_memory(meeting: Meeting, refusals: list[str], timeout_s: float) -> NetworkCommunicator:
    """Connect over TCP inside the host, because some rank may not open another's memory."""
    rank = next(r for r, text in enumerate(refusals) if text)
    if meeting.rank == 0:
        warnings.warn(
            f"no shared memory between the ranks of this host, TCP instead: rank {rank}: {refusals[rank]}",
            stacklevel=2,
        )
    hosts = tuple(f"{host}/{r}" for r, host in enumerate(meeting.hosts))
    apart = dataclasses.replace(meeting, hosts=hosts, addresses=("127.0.0.1",) * meeting.size)
    return connect_hosts(apart, timeout_s=timeout_s)


def _join(meeting: Meeting, timeout_s: float) -> NativeCommunicator:
    """A communicator of the meeting's ranks, through its store alone."""
    group = _core.Group(engine(), meeting.rank, meeting.size)
    addresses = meeting.exchange("native", group.address, timeout_s=timeout_s)
    group.connect([tuple(address) for address in addresses])
    comm = NativeCommunicator(meeting.rank, meeting.hosts, group, timeout_s=timeout_s)
    comm._home = meeting
    return comm


def _protocol(operation: str, num_bytes: int, size: int, buffers: str) -> tuple[str, str, str | None]:
    """Name, reason and runner-up; csrc/core/shared_memory/combine.cpp and exchange.cpp decide alike."""
    reduces = operation in ("all_reduce", "reduce", "reduce_scatter")
    limit = _core.eager_reduce_bytes(size) if reduces else _core.EAGER_BYTES
    if operation == "barrier" or num_bytes <= limit:
        return "eager", f"up to {limit} bytes the data travels with the announcement, in one step", "staged"
    if buffers == "allocated":
        return "zero-copy", "the buffers lie in shared memory: peers read and write them in place", "staged"
    return (
        "staged",
        "the buffers are private: slices go through stages of the size of a cache",
        "zero-copy (with buffers from comm.allocate)",
    )


class NativeCommunicator(ChoosingCommunicator):
    """A communicator over one shared-memory group."""

    def __init__(self, rank: Rank, hosts: Sequence[str], group: _core.Group, *, timeout_s: float) -> None:
        super().__init__(rank, hosts, group, timeout_s=timeout_s)
        self._group = group
        self._reduce_now = group.all_reduce
        self.ledger.operations["all_reduce"] = self._n_all_reduce = group.reduced
        self._home: Meeting | None = None  # where exactly these ranks can meet again
        self._num_parts = 0

    def explain(self, operation: str, num_bytes: int, *, buffers: str = "private") -> Choice:
        """Which protocol `operation` gets for a buffer of `num_bytes`, why, and the runner-up."""
        check_operation(operation)
        if buffers not in ("private", "allocated"):
            raise ConfigError(f"explain: buffers={buffers!r}: 'private' or 'allocated' expected")
        name, reason, other = _protocol(operation, num_bytes, self.size, buffers)
        return Choice(operation, num_bytes, name, reason, other)

    def using(self, algorithm: str) -> NoReturn:
        """Refused: here the protocol follows from the size and the buffers."""
        raise ConfigError(
            f"{self._who()}: algorithm={algorithm!r}: over shared memory the protocol follows from the size"
            " and the buffers (see explain); algorithms can be chosen between hosts"
        )

    def _open_urgent_lane(self) -> NativeCommunicator:
        assert self._home is not None
        lane = _join(self._home.part("urgent", range(self.size)), self.timeout_s)
        lane._group.reduced = self._group.reduced
        return lane

    def tolerate_loss(self) -> None:
        """From now on collectives go on among the living, if `min_size` allows losses. All ranks call it."""
        super().tolerate_loss()
        if self._survivors is not None:
            setattr(self, "all_reduce", super().all_reduce)  # noqa: B010  the short cut would miss them

    # Operations

    def all_reduce(
        self,
        tensor: torch.Tensor,
        *,
        op: ReduceOp = ReduceOp.SUM,
        algorithm: str | None = None,
        priority: int = 0,
    ) -> Work:
        """Replace `tensor` on every rank by the reduction over ranks."""
        # The core looks at the tensor itself: small ones take a microsecond, asking torch half of that.
        code = 0 if op is ReduceOp.SUM else OP_CODES.get(op)
        if code is not None and self.unusable is None and not priority and algorithm is None:
            try:
                operation = self._reduce_now(tensor, code, self.timeout_s)
            except CommError as error:
                return self._failed(error)
            if operation is None:
                return DONE
            if operation is not False:
                return self._pending(operation, (tensor,))
        return super().all_reduce(tensor, op=op, algorithm=algorithm, priority=priority)

    # Groups

    def _split(self, ranks: list[Rank]) -> NativeCommunicator | None:
        group = None
        self._num_parts += 1
        mine = torch.zeros(5, dtype=torch.int64)
        if self.rank in ranks:
            group = _core.Group(engine(), ranks.index(self.rank), len(ranks))
            mine = torch.tensor(group.address, dtype=torch.int64)
        everyone = torch.empty(5 * self.size, dtype=torch.int64)
        self.start_all_gather(everyone, mine).wait()
        if group is None:
            return None
        rows = everyone.view(self.size, 5).tolist()
        group.connect([tuple(rows[r]) for r in ranks])
        place = ranks.index(self.rank)
        part = NativeCommunicator(place, [self.hosts[r] for r in ranks], group, timeout_s=self.timeout_s)
        if self._home is not None:
            part._home = self._home.part(f"{self._num_parts}", ranks)
        return part
