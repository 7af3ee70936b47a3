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
from paceline.comm.native_codes import DTYPE_CODES, OP_CODES, Kind
from paceline.comm.native_core import CoreCommunicator, engine
from paceline.comm.native_network import NetworkCommunicator, connect_hosts
from paceline.comm.native_work import DONE
from paceline.comm.rendezvous import Meeting
from paceline.errors import CommError, ConfigError, Timeout
from paceline.types import Rank, ReduceOp, Work


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
        self._group = group
        self._submit = group.combine

    # Operations

    def _all_reduce(self, tensor: torch.Tensor, op: ReduceOp) -> Work:
        code = DTYPE_CODES.get(tensor.dtype)
        if code is None or not tensor.is_cpu or (op is not ReduceOp.SUM and not self._is_reducible(code, op)):
            self._refuse_tensor("all_reduce", tensor, op)
        pointer = tensor.data_ptr()
        try:
            operation = self._submit(
                Kind.ALL_REDUCE, pointer, pointer, tensor.numel(), code, OP_CODES[op], 0, (), self.timeout_s
            )
        except CommError as error:
            return self._failed(error)
        return DONE if operation is None else self._pending(operation, (tensor,))

    def _reduce(self, tensor: torch.Tensor, root: Rank, op: ReduceOp) -> Work:
        return self._combine("reduce", Kind.REDUCE, tensor, tensor, root, op, ())

    def _reduce_scatter(self, output: torch.Tensor, source: torch.Tensor, op: ReduceOp) -> Work:
        counts = (output.numel(),) * self.size
        return self._combine("reduce_scatter", Kind.REDUCE_SCATTER, output, source, 0, op, counts)

    def _reduce_scatter_v(
        self, output: torch.Tensor, source: torch.Tensor, counts: Sequence[int], op: ReduceOp
    ) -> Work:
        return self._combine("reduce_scatter_v", Kind.REDUCE_SCATTER, output, source, 0, op, counts)

    def _broadcast(self, tensor: torch.Tensor, root: Rank) -> Work:
        n = tensor.numel()
        send = (n,) if self.rank == root else ()
        receive = () if self.rank == root else self._only(root, n)
        return self._exchange(Kind.BROADCAST, tensor, tensor, n, root, send, receive, same=True)

    def _all_gather(self, output: torch.Tensor, source: torch.Tensor) -> Work:
        n = source.numel()
        return self._exchange(Kind.ALL_GATHER, output, source, n, 0, (n,), (n,) * self.size, same=True)

    def _all_gather_v(self, output: torch.Tensor, source: torch.Tensor, counts: Sequence[int]) -> Work:
        send = (source.numel(),)
        return self._exchange(Kind.ALL_GATHER, output, source, output.numel(), 0, send, counts, same=True)

    def _gather(self, output: torch.Tensor | None, source: torch.Tensor, root: Rank) -> Work:
        n = source.numel()
        receive = (n,) * self.size if output is not None else ()
        return self._exchange(Kind.GATHER, output, source, n, root, self._only(root, n), receive)

    def _scatter(self, output: torch.Tensor, source: torch.Tensor | None, root: Rank) -> Work:
        n = output.numel()
        send = (n,) * self.size if source is not None else ()
        return self._exchange(Kind.SCATTER, output, source, n, root, send, self._only(root, n))

    def _all_to_all(self, output: torch.Tensor, source: torch.Tensor) -> Work:
        n = source.numel() // self.size
        return self._exchange(Kind.ALL_TO_ALL, output, source, n, 0, (n,) * self.size, (n,) * self.size)

    def _all_to_all_v(
        self,
        output: torch.Tensor,
        source: torch.Tensor,
        output_counts: Sequence[int],
        source_counts: Sequence[int],
    ) -> Work:
        return self._exchange(Kind.ALL_TO_ALL, output, source, 0, 0, source_counts, output_counts)

    def _barrier(self) -> Work:
        try:
            operation = self._group.exchange(Kind.BARRIER, 0, 0, 0, 0, 0, (), (), True, self.timeout_s)
        except CommError as error:
            return self._failed(error)
        return DONE if operation is None else self._pending(operation, ())

    def _combine(
        self,
        name: str,
        kind: int,
        output: torch.Tensor,
        source: torch.Tensor,
        root: Rank,
        op: ReduceOp,
        counts: Sequence[int],
    ) -> Work:
        code = self._code(source.dtype, source)
        if not self._is_reducible(code, op):
            self._refuse_tensor(name, source, op)
        try:
            operation = self._group.combine(
                kind,
                source.data_ptr(),
                output.data_ptr(),
                source.numel(),
                code,
                OP_CODES[op],
                root,
                counts,
                self.timeout_s,
            )
        except CommError as error:
            return self._failed(error)
        return DONE if operation is None else self._pending(operation, (output, source))

    def _exchange(
        self,
        kind: int,
        output: torch.Tensor | None,
        source: torch.Tensor | None,
        numel: int,
        root: Rank,
        send: Sequence[int],
        receive: Sequence[int],
        same: bool = False,
    ) -> Work:
        present = output if output is not None else source
        assert present is not None
        code = self._code(present.dtype, present)
        try:
            operation = self._group.exchange(
                kind,
                0 if source is None else source.data_ptr(),
                0 if output is None else output.data_ptr(),
                numel,
                code,
                root,
                send,
                receive,
                same,
                self.timeout_s,
            )
        except CommError as error:
            return self._failed(error)
        return DONE if operation is None else self._pending(operation, (output, source))

    def _only(self, rank: Rank, count: int) -> tuple[int, ...]:
        return tuple(count if r == rank else 0 for r in range(self.size))

    # Groups

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
