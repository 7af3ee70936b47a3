"""The native fabric: ranks of one host exchange tensors through shared memory, driven by the C++ core.

Buffers from `allocate` lie in shared memory, so peers read and write them in place; private tensors go
through cache-sized stages. Nothing is ever named in the file system: memory disappears with its last user.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Literal, cast

import torch

from paceline import _core
from paceline.comm.ledger import Ledger
from paceline.comm.native.choice import Choice, check_operation
from paceline.comm.native.codes import OP_CODES
from paceline.comm.native.communicator import NativeCommunicator, engine
from paceline.comm.native.hierarchical import HierarchicalCommunicator, with_shared_memory
from paceline.comm.native.network import NetworkCommunicator, connect_hosts
from paceline.comm.native.work import DONE
from paceline.comm.rendezvous.meeting import Meeting
from paceline.errors import CommError, ConfigError
from paceline.types import Rank, ReduceOp, Work


def connect(
    meeting: Meeting, *, timeout_s: float, device: torch.device | None = None
) -> SharedMemoryCommunicator | NetworkCommunicator | HierarchicalCommunicator:
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
    group = _core.SharedMemoryGroup(core, meeting.rank, meeting.size)
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
    comm = SharedMemoryCommunicator(meeting.rank, meeting.hosts, group, timeout_s=timeout_s, home=meeting)
    comm.meeting = meeting
    comm.ledger.wire_bytes = 0  # nothing leaves the host
    comm.barrier().wait()  # no rank depends on the store any more
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


def _join(meeting: Meeting, timeout_s: float, ledger: Ledger) -> SharedMemoryCommunicator:
    """One more communicator of the meeting's ranks, through its store alone."""
    group = _core.SharedMemoryGroup(engine(), meeting.rank, meeting.size)
    addresses = meeting.exchange("native", group.address, timeout_s=timeout_s)
    group.connect([tuple(address) for address in addresses])
    return SharedMemoryCommunicator(
        meeting.rank, meeting.hosts, group, timeout_s=timeout_s, home=meeting, ledger=ledger
    )


def _protocol(operation: str, num_bytes: int, size: int, buffers: str) -> tuple[str, str, str | None]:
    """Name, reason and runner-up; the limits are those by which the core decides."""
    if operation in ("all_reduce", "reduce", "reduce_scatter"):
        limit = _core.eager_reduce_bytes(size)
    else:
        limit = _core.eager_exchange_bytes(size, operation in ("broadcast", "all_gather"))
    if operation == "barrier" or num_bytes <= limit:
        return "eager", f"up to {limit} bytes the data travels with the announcement, in one step", "staged"
    if buffers == "allocated":
        return "zero-copy", "the buffers lie in shared memory: peers read and write them in place", "staged"
    return (
        "staged",
        "the buffers are private: slices go through stages of the size of a cache",
        "zero-copy (with buffers from comm.allocate)",
    )


AtOnce = Callable[[torch.Tensor, int, float], "_core.Operation | Literal[False] | None"]
"""(tensor, operator, seconds) → None: done; an Operation: under way; False: not taken."""


class SharedMemoryCommunicator(NativeCommunicator):
    """A communicator over one shared-memory group."""

    def __init__(
        self,
        rank: Rank,
        hosts: Sequence[str],
        group: _core.SharedMemoryGroup,
        *,
        timeout_s: float,
        home: Meeting | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        super().__init__(rank, hosts, group, timeout_s=timeout_s, ledger=ledger)
        self.shared_memory_group = group
        """The core's group, for the fast path of the torch.distributed backend."""
        # The core counts the calls that it takes at once; an urgent lane counts where its communicator does.
        if ledger is None:
            self.ledger.counters.all_reduce = group.reduced
        else:
            group.reduced = cast(_core.OperationCount, ledger.counters.all_reduce)
        self._all_reduce_at_once: AtOnce = group.all_reduce
        self._home = home  # where exactly these ranks can meet again
        self._num_parts = 0

    def explain(self, operation: str, num_bytes: int, *, buffers: str = "private") -> Choice:
        """Which protocol `operation` gets for a buffer of `num_bytes`, why, and the runner-up."""
        check_operation(operation)
        if buffers not in ("private", "allocated"):
            raise ConfigError(f"explain: buffers={buffers!r}: 'private' or 'allocated' expected")
        name, reason, other = _protocol(operation, num_bytes, self.size, buffers)
        return Choice(operation, num_bytes, name, reason, other)

    def check_algorithm(self, operation: str, algorithm: str) -> None:
        """Refused: here the protocol follows from the size and the buffers."""
        raise ConfigError(
            f"{self.who()}: {operation}: algorithm={algorithm!r}: over shared memory the protocol follows"
            " from the size and the buffers (see explain); algorithms can be chosen between hosts"
        )

    def make_urgent_lane(self) -> SharedMemoryCommunicator:
        assert self._home is not None
        return _join(self._home.part("urgent", range(self.size)), self.timeout_s, self.ledger)

    def tolerate_loss(self) -> None:
        """From now on collectives continue among the living ranks, if `min_size` allows losses."""
        super().tolerate_loss()
        if self.min_size < self.size:
            self._all_reduce_at_once = _never  # the short cut would miss the survivors' protocol

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
                operation = self._all_reduce_at_once(tensor, code, self.timeout_s)
            except CommError as error:
                return self.failed(error)
            if operation is None:
                return DONE
            if operation is not False:
                return self.pending(operation, (tensor,))
        return super().all_reduce(tensor, op=op, algorithm=algorithm, priority=priority)

    # Groups

    def make_part(self, ranks: list[Rank]) -> SharedMemoryCommunicator | None:
        group = None
        self._num_parts += 1
        mine = torch.zeros(5, dtype=torch.int64)
        if self.rank in ranks:
            group = _core.SharedMemoryGroup(engine(), ranks.index(self.rank), len(ranks))
            mine = torch.tensor(group.address, dtype=torch.int64)
        addresses = torch.empty(5 * self.size, dtype=torch.int64)
        self.start_all_gather(addresses, mine).wait()
        if group is None:
            return None
        rows = addresses.view(self.size, 5).tolist()
        group.connect([tuple(rows[r]) for r in ranks])
        return SharedMemoryCommunicator(
            ranks.index(self.rank),
            [self.hosts[r] for r in ranks],
            group,
            timeout_s=self.timeout_s,
            home=None if self._home is None else self._home.part(f"{self._num_parts}", ranks),
        )


def _never(tensor: torch.Tensor, op: int, timeout_s: float) -> Literal[False]:
    """False, as the core says of a call that it does not take at once."""
    return False
