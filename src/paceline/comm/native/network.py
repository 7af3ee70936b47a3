"""The native fabric between hosts: programs of `paceline.collectives`, run over TCP by the core."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from paceline import _core, collectives
from paceline.comm.native import uneven
from paceline.comm.native.choosing import ChoosingCommunicator, replaced
from paceline.comm.native.codes import OP_CODES, Kind
from paceline.comm.native.communicator import engine
from paceline.comm.native.plan import plan
from paceline.comm.native.select import DIRECT, Choice, Table, check_operation
from paceline.comm.native.work import DONE
from paceline.comm.rendezvous.meeting import Meeting
from paceline.errors import CommError, ConfigError, Timeout
from paceline.options import JobOptions
from paceline.types import Rank, ReduceOp, Work

INTERFACE = "PACELINE_INTERFACE"
"""Interfaces or addresses of this host to use, separated by commas, where the launcher says none."""
_FEW_RANKS = 16
"""Up to here everybody talks to everybody: two steps, and no more bytes than a ring."""
_LITTLE_BYTES = 32 << 10
"""All ranks' data in one step up to here."""


def algorithm_for(operation: str, num_bytes: int, num_ranks: int) -> str:
    """Return the algorithm of an operation over the network, by its size in bytes.

    "direct" is the core's own (csrc/core/network/direct.h): all ranks talk to each other, straight from and
    into the user's memory. Others are programs of `paceline.collectives`, which need fewer connections.
    """
    if num_ranks <= _FEW_RANKS or operation in ("gather", "scatter", "all_to_all", "barrier"):
        return "direct"
    if operation == "all_reduce":
        return "recursive_doubling" if num_bytes <= _LITTLE_BYTES else "ring"
    return "ring" if operation in ("reduce_scatter", "all_gather") else "binomial_tree"


def connect_hosts(meeting: Meeting, *, timeout_s: float) -> NetworkCommunicator:
    """Join ranks of several hosts over TCP; Timeout names a rank that did not come."""
    store = meeting.store
    if meeting.rank == 0:
        store.set("native/session", secrets.token_hex(16))
    session = bytes.fromhex(_read(meeting, "native/session", 0, timeout_s))
    towards = next((a for r, a in enumerate(meeting.addresses) if a and r != meeting.rank), "127.0.0.1")
    wanted = JobOptions.from_environment(os.environ).interface or os.environ.get(INTERFACE, "")
    try:
        network = _core.Network(
            engine(),
            meeting.rank,
            meeting.size,
            meeting.secret,
            session,
            wanted or meeting.address,
            towards,
        )
    except (ValueError, RuntimeError) as error:
        where = f"--interface or {INTERFACE} says {wanted!r}: " if wanted else ""
        raise ConfigError(
            f"rank {meeting.rank} (host {meeting.hosts[meeting.rank]}): {where}{error}"
        ) from error
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


class NetworkCommunicator(ChoosingCommunicator):
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
        self._id = ids[0]
        self._ids = ids
        self._group = _core.NetworkGroup(network, ids[0], rank, world_ranks)
        ids[0] += 1
        super().__init__(rank, hosts, self._group, timeout_s=timeout_s)
        self._network = network
        self._world_ranks = world_ranks
        self.selection = Table()
        """Measured choices; empty: the rule of `algorithm_for`. The same on all ranks."""
        self.algorithm_for: Callable[[str, int, int], str] = self._select
        """Chooses an algorithm for (operation, bytes, ranks); the same on all ranks."""

    def _select(self, operation: str, num_bytes: int, num_ranks: int) -> str:
        choice = self.selection.find(operation, num_bytes) if self.selection.choices else None
        return algorithm_for(operation, num_bytes, num_ranks) if choice is None else choice.algorithm

    def explain(self, operation: str, num_bytes: int, *, buffers: str = "private") -> Choice:
        """Which algorithm `operation` gets for a buffer of `num_bytes`, why, and the runner-up."""
        check_operation(operation)
        choice = self.selection.find(operation, num_bytes)
        if choice is not None:
            reason = choice.reason
            if choice.num_bytes != num_bytes:
                reason += f" (at {choice.num_bytes} bytes, the nearest size measured)"
            return dataclasses.replace(choice, num_bytes=num_bytes, reason=reason)
        name = algorithm_for(operation, num_bytes, self.size)
        why = f"up to {_FEW_RANKS} ranks everybody talks to everybody at once, in one or two steps"
        if name != DIRECT:
            why = f"more than {_FEW_RANKS} ranks: few connections, at {num_bytes} bytes"
        other = "ring" if name == DIRECT else DIRECT
        return Choice(operation, num_bytes, name, f"{why}; nothing was measured on this cluster", other)

    @contextlib.contextmanager
    def using(self, algorithm: str) -> Iterator[None]:
        """Operations inside run `algorithm`; the same on all ranks. ConfigError for one that is unknown."""
        is_own = algorithm == DIRECT or uneven.parse(algorithm, self.size) is not None
        if not is_own:
            collectives.find(algorithm.partition(":")[0])

        def fixed(operation: str, num_bytes: int, num_ranks: int) -> str:
            name = algorithm.partition(":")[0]
            if not is_own:
                answer = collectives.supports(name, operation, num_ranks)
                if not answer:
                    raise ConfigError(f"{name} cannot do {operation} on {num_ranks} ranks: {answer}")
            return algorithm

        with replaced(self, "algorithm_for", fixed):
            yield

    def _open_urgent_lane(self) -> NetworkCommunicator:
        lane = NetworkCommunicator(
            self.rank,
            self.hosts,
            self._network,
            self._world_ranks,
            ids=[self._id | 1 << 31],
            timeout_s=self.timeout_s,
        )
        lane.selection = self.selection
        return lane

    @property
    def network_group(self) -> _core.NetworkGroup:
        """The core's group of all ranks."""
        return self._group

    def stripe_group(self, ranks: Sequence[Rank]) -> _core.NetworkGroup:
        """One more group of the core, of `ranks`; every rank may be in one, made beside those of others."""
        mine = [self._world_ranks[r] for r in ranks]
        return _core.NetworkGroup(self._network, self._id | 1 << 30, ranks.index(self.rank), mine)

    @property
    def wire_bytes(self) -> int:
        """Bytes that this process put on the network."""
        return self._network.wire_bytes

    def start_all_reduce(self, tensor: torch.Tensor, op: ReduceOp) -> Work:
        name = self.algorithm_for("all_reduce", tensor.numel() * tensor.itemsize, self.size)
        if name == DIRECT:
            return super().start_all_reduce(tensor, op)
        shares = uneven.parse(name, self.size)
        if shares is not None:
            counts = uneven.counts(tensor.numel(), shares)
            return self._combine("all_reduce", Kind.ALL_REDUCE, tensor, tensor, 0, op, counts)
        return self._run(name, "all_reduce", Kind.ALL_REDUCE, tensor, tensor, tensor.numel(), op=op)

    def start_reduce(self, tensor: torch.Tensor, root: Rank, op: ReduceOp) -> Work:
        program = self._program("reduce", tensor)
        if program is None:
            return super().start_reduce(tensor, root, op)
        return self._run(program, "reduce", Kind.REDUCE, tensor, tensor, tensor.numel(), root=root, op=op)

    def start_broadcast(self, tensor: torch.Tensor, root: Rank) -> Work:
        program = self._program("broadcast", tensor)
        if program is None:
            return super().start_broadcast(tensor, root)
        return self._run(program, "broadcast", Kind.BROADCAST, tensor, tensor, tensor.numel(), root=root)

    def start_all_gather(self, output: torch.Tensor, source: torch.Tensor) -> Work:
        program = self._program("all_gather", output)
        if program is None:
            return super().start_all_gather(output, source)
        return self._run(program, "all_gather", Kind.ALL_GATHER, output, source, source.numel())

    def start_all_gather_v(self, output: torch.Tensor, source: torch.Tensor, counts: Sequence[int]) -> Work:
        program = self._program("all_gather", output)
        if program is None:
            return super().start_all_gather_v(output, source, counts)
        return self._run(program, "all_gather_v", Kind.ALL_GATHER, output, source, tuple(counts))

    def start_reduce_scatter(self, output: torch.Tensor, source: torch.Tensor, op: ReduceOp) -> Work:
        program = self._program("reduce_scatter", source)
        if program is None:
            return super().start_reduce_scatter(output, source, op)
        kind = Kind.REDUCE_SCATTER
        return self._run(program, "reduce_scatter", kind, output, source, output.numel(), op=op)

    def start_reduce_scatter_v(
        self, output: torch.Tensor, source: torch.Tensor, counts: Sequence[int], op: ReduceOp
    ) -> Work:
        program = self._program("reduce_scatter", source)
        if program is None:
            return super().start_reduce_scatter_v(output, source, counts, op)
        kind = Kind.REDUCE_SCATTER
        return self._run(program, "reduce_scatter_v", kind, output, source, tuple(counts), op=op)

    def _program(self, operation: str, whole: torch.Tensor) -> str | None:
        """Name of the program to run, None for the core's own algorithm."""
        name = self.algorithm_for(operation, whole.numel() * whole.itemsize, self.size)
        return None if name == DIRECT or name.startswith(uneven.PREFIX) else name

    def _run(
        self,
        algorithm: str,
        operation: str,
        kind: Kind,
        output: torch.Tensor,
        source: torch.Tensor,
        counts: int | tuple[int, ...],
        *,
        root: Rank = 0,
        op: ReduceOp = ReduceOp.SUM,
    ) -> Work:
        code = self._code(output.dtype, output)
        if not self._is_reducible(code, op):
            self._refuse_tensor(operation, output, op)
        in_place = output is source
        program = plan(
            algorithm, operation, self.size, root, self.rank, in_place, counts, output.dtype.itemsize
        )
        try:
            started = self._group.run(
                program,
                kind,
                source.data_ptr(),
                output.data_ptr(),
                output.numel(),
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
        self.start_all_reduce(agreed, ReduceOp.MAX).wait()
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
