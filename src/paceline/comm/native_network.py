"""The native fabric between hosts: programs of `paceline.collectives`, run over TCP by the core."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence

import torch

from paceline import _core
from paceline.comm.native_codes import DTYPE_CODES, OP_CODES, Kind
from paceline.comm.native_core import CoreCommunicator, engine
from paceline.comm.native_plan import plan
from paceline.comm.native_work import DONE
from paceline.comm.rendezvous import Meeting
from paceline.errors import CommError, ConfigError, Timeout
from paceline.types import Rank, ReduceOp, Work

_FEW_RANKS = 16
"""Up to here everybody talks to everybody: two steps, and no more bytes than a ring."""
_LITTLE_BYTES = 32 << 10
"""All ranks' data in one step up to here."""


def algorithm_for(operation: str, num_bytes: int, num_ranks: int) -> str:
    """Return the program for an operation over the network, by its size.

    "direct" is the core's own all_reduce, all pairs in one or two steps (csrc/core/direct.h): it sends from
    and receives into the user's memory, and reduces one slice while others travel.
    """
    if operation == "all_reduce":
        if num_ranks > _FEW_RANKS:
            return "recursive_doubling" if num_bytes <= _LITTLE_BYTES else "ring"
        return "direct"
    if operation in ("reduce_scatter", "all_gather", "reduce_scatter_v", "all_gather_v"):
        return "all_pairs" if num_ranks <= _FEW_RANKS else "ring"
    if operation in ("all_to_all", "all_to_all_v"):
        return "pairwise"
    return "dissemination" if operation == "barrier" else "binomial_tree"


def connect_hosts(meeting: Meeting, *, timeout_s: float) -> NetworkCommunicator:
    """Join ranks of several hosts over TCP; Timeout names a rank that did not come."""
    store = meeting.store
    if meeting.rank == 0:
        store.set("native/session", secrets.token_hex(16))
    session = bytes.fromhex(_read(meeting, "native/session", 0, timeout_s))
    towards = next((a for r, a in enumerate(meeting.addresses) if a and r != meeting.rank), "127.0.0.1")
    network = _core.Network(
        engine(), meeting.rank, meeting.size, meeting.secret, session, meeting.address, towards
    )
    store.set(f"native/endpoints/{meeting.rank}", network.endpoints)
    everyone = [_read(meeting, f"native/endpoints/{r}", r, timeout_s) for r in range(meeting.size)]
    network.set_peers(everyone)
    comm = NetworkCommunicator(
        meeting.rank, meeting.hosts, network, list(range(meeting.size)), ids=[0], timeout_s=timeout_s
    )
    comm.meeting = meeting
    comm.barrier().wait()
    return comm


def _read(meeting: Meeting, key: str, rank: Rank, timeout_s: float) -> str:
    deadline = time.monotonic() + timeout_s
    while not meeting.store.check([key]):
        if time.monotonic() > deadline:
            raise Timeout(
                f"rank {meeting.rank}: rank {rank} (host {meeting.hosts[rank]}) did not join the native"
                f" fabric within {timeout_s:g} s; is it alive, and was fabric='native' chosen there too?"
            )
        time.sleep(0.002)
    return str(meeting.store.get(key).decode())


class NetworkCommunicator(CoreCommunicator):
    """A communicator over TCP; `world_ranks[r]` is rank r's number on the network."""

    def __init__(
        self,
        rank: Rank,
        hosts: Sequence[str],
        network: _core.Network,
        world_ranks: list[int],
        *,
        ids: list[int],
        timeout_s: float,
    ) -> None:
        # ids[0] numbers the groups of this process on this network; members of a group agree on its number.
        self._is_world = ids[0] == 0
        self._ids = ids
        self._group = _core.NetworkGroup(network, ids[0], rank, world_ranks)
        ids[0] += 1
        super().__init__(rank, hosts, self._group, timeout_s=timeout_s)
        self._network = network
        self._world_ranks = world_ranks

    @property
    def wire_bytes(self) -> int:
        """Bytes that this process put on the network."""
        return self._network.wire_bytes

    def _all_reduce(self, tensor: torch.Tensor, op: ReduceOp) -> Work:
        if self.size > _FEW_RANKS:
            return self._run("all_reduce", Kind.ALL_REDUCE, tensor, tensor, tensor.numel(), op=op)
        code, pointer = self._code(tensor.dtype, tensor), tensor.data_ptr()
        if not self._is_reducible(code, op):
            self._refuse_tensor("all_reduce", tensor, op)
        try:
            started = self._group.all_reduce_directly(
                pointer, pointer, tensor.numel(), code, OP_CODES[op], self.timeout_s
            )
        except CommError as error:
            return self._failed(error)
        return DONE if started is None else self._pending(started, (tensor,))

    def _reduce(self, tensor: torch.Tensor, root: Rank, op: ReduceOp) -> Work:
        return self._run("reduce", Kind.REDUCE, tensor, tensor, tensor.numel(), root=root, op=op)

    def _broadcast(self, tensor: torch.Tensor, root: Rank) -> Work:
        return self._run("broadcast", Kind.BROADCAST, tensor, tensor, tensor.numel(), root=root)

    def _all_gather(self, output: torch.Tensor, source: torch.Tensor) -> Work:
        return self._run("all_gather", Kind.ALL_GATHER, output, source, source.numel())

    def _all_gather_v(self, output: torch.Tensor, source: torch.Tensor, counts: Sequence[int]) -> Work:
        return self._run("all_gather_v", Kind.ALL_GATHER, output, source, tuple(counts))

    def _reduce_scatter(self, output: torch.Tensor, source: torch.Tensor, op: ReduceOp) -> Work:
        return self._run("reduce_scatter", Kind.REDUCE_SCATTER, output, source, output.numel(), op=op)

    def _reduce_scatter_v(
        self, output: torch.Tensor, source: torch.Tensor, counts: Sequence[int], op: ReduceOp
    ) -> Work:
        return self._run("reduce_scatter_v", Kind.REDUCE_SCATTER, output, source, tuple(counts), op=op)

    def _gather(self, output: torch.Tensor | None, source: torch.Tensor, root: Rank) -> Work:
        return self._run("gather", Kind.GATHER, output, source, source.numel(), root=root)

    def _scatter(self, output: torch.Tensor, source: torch.Tensor | None, root: Rank) -> Work:
        return self._run("scatter", Kind.SCATTER, output, source, output.numel(), root=root)

    def _all_to_all(self, output: torch.Tensor, source: torch.Tensor) -> Work:
        return self._run("all_to_all", Kind.ALL_TO_ALL, output, source, source.numel() // self.size)

    def _all_to_all_v(
        self,
        output: torch.Tensor,
        source: torch.Tensor,
        output_counts: Sequence[int],
        source_counts: Sequence[int],
    ) -> Work:
        # A direct exchange touches only the own row and column of the matrix; nobody knows the rest.
        rows = [[0] * self.size for _ in range(self.size)]
        for r in range(self.size):
            rows[r][self.rank] = output_counts[r]
        rows[self.rank] = list(source_counts)
        if output_counts[self.rank] != source_counts[self.rank]:
            raise ConfigError(
                f"{self._who()}: all_to_all_v: {source_counts[self.rank]} elements sent to this rank itself,"
                f" {output_counts[self.rank]} expected"
            )
        return self._run("all_to_all_v", Kind.ALL_TO_ALL, output, source, tuple(map(tuple, rows)))

    def _barrier(self) -> Work:
        return self._run("barrier", Kind.BARRIER, None, None, 0)

    def _run(
        self,
        operation: str,
        kind: Kind,
        output: torch.Tensor | None,
        source: torch.Tensor | None,
        counts: int | tuple[int, ...] | tuple[tuple[int, ...], ...],
        *,
        root: Rank = 0,
        op: ReduceOp = ReduceOp.SUM,
    ) -> Work:
        present = output if output is not None else source
        code, item, numel = DTYPE_CODES[torch.uint8], 1, 0
        if present is not None:
            code, item, numel = self._code(present.dtype, present), present.dtype.itemsize, present.numel()
            if not self._is_reducible(code, op):
                self._refuse_tensor(operation, present, op)
        if self.size == 1 and operation == "barrier":
            return DONE
        in_place = output is source and output is not None
        algorithm = algorithm_for(operation, numel * item, self.size)
        program = plan(algorithm, operation, self.size, root, self.rank, in_place, counts, item)
        try:
            started = self._group.run(
                program,
                kind,
                0 if source is None else source.data_ptr(),
                0 if output is None else output.data_ptr(),
                numel,
                code,
                OP_CODES[op],
                root,
                self.timeout_s,
            )
        except CommError as error:
            return self._failed(error)
        return DONE if started is None else self._pending(started, (output, source))

    def _split(self, ranks: list[Rank]) -> NetworkCommunicator | None:
        agreed = torch.tensor(self._ids, dtype=torch.int64)
        self._all_reduce(agreed, ReduceOp.MAX).wait()
        self._ids[0] = int(agreed[0])
        if self.rank not in ranks:
            return None
        return NetworkCommunicator(
            ranks.index(self.rank),
            [self.hosts[r] for r in ranks],
            self._network,
            [self._world_ranks[r] for r in ranks],
            ids=self._ids,
            timeout_s=self.timeout_s,
        )

    def _close(self) -> None:
        self.ledger.wire_bytes = self._network.wire_bytes
        super()._close()
        if self._is_world:
            self._network.close()
