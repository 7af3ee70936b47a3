"""The native fabric between hosts: programs of `paceline.collectives`, run over TCP by the core."""

from __future__ import annotations

import dataclasses
import os
import secrets
import time
from collections.abc import Sequence

import torch

from paceline import _core, collectives
from paceline.comm.ledger import Ledger
from paceline.comm.native import uneven
from paceline.comm.native.choice import DIRECT, Choice, ChoiceTable, check_operation
from paceline.comm.native.codes import OP_CODES
from paceline.comm.native.codes import OperationKind as Kind
from paceline.comm.native.communicator import NativeCommunicator, engine
from paceline.comm.native.plan import plan
from paceline.comm.native.work import DONE
from paceline.comm.rendezvous.interfaces import chosen
from paceline.comm.rendezvous.meeting import Meeting
from paceline.errors import CommError, ConfigError, Timeout
from paceline.options import JobOptions
from paceline.types import DEFAULT_OPTIONS, CallOptions, Rank, ReduceOp, Work

INTERFACE = "PACELINE_INTERFACE"
"""Interfaces or addresses of this host to use, separated by commas, where the launcher says none."""
_FEW_RANKS = 16
"""Up to here every rank talks to every other: two steps, and no more bytes than a ring."""
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
        local = ",".join(chosen(wanted)) if wanted else meeting.address
        network = _core.TcpTransport(
            engine(),
            meeting.rank,
            meeting.size,
            meeting.secret,
            session,
            local,
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


class NetworkCommunicator(NativeCommunicator):
    """A communicator over TCP; `world_ranks[r]` is rank r's number on the network."""

    def __init__(
        self,
        rank: Rank,
        hosts: Sequence[str],
        network: _core.TcpTransport,
        world_ranks: list[int],
        *,
        ids: list[int],
        timeout_s: float,
        ledger: Ledger | None = None,
    ) -> None:
        # ids[0] numbers the groups of this process on this network; members of a group agree on its number.
        self._is_world = ids[0] == 0
        self._id = ids[0]
        self._ids = ids
        self._group = _core.NetworkGroup(network, ids[0], rank, world_ranks)
        ids[0] += 1
        super().__init__(rank, hosts, self._group, timeout_s=timeout_s, ledger=ledger)
        self._network = network
        self._world_ranks = world_ranks
        self.selection = ChoiceTable()
        """Measured choices; empty: the rule of `algorithm_for`. The same on all ranks."""

    def algorithm_for(self, operation: str, num_bytes: int) -> str:
        """The algorithm of an operation on `num_bytes` bytes that asks for none; the same on all ranks."""
        choice = self.selection.find(operation, num_bytes) if self.selection.choices else None
        return algorithm_for(operation, num_bytes, self.size) if choice is None else choice.algorithm

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
        why = f"up to {_FEW_RANKS} ranks every rank talks to every other at once, in one or two steps"
        if name != DIRECT:
            why = f"more than {_FEW_RANKS} ranks: few connections, at {num_bytes} bytes"
        other = "ring" if name == DIRECT else DIRECT
        return Choice(operation, num_bytes, name, f"{why}; nothing was measured on this cluster", other)

    def check_algorithm(self, operation: str, algorithm: str) -> None:
        """ConfigError unless `operation` can run `algorithm` on these ranks."""
        if algorithm == DIRECT or uneven.parse(algorithm, self.size) is not None:
            return
        name, options = collectives.parse(algorithm)
        answer = collectives.supports(name, operation, self.size, **options)
        if not answer:
            raise ConfigError(f"{name} cannot do {operation} on {self.size} ranks: {answer}")

    def make_urgent_lane(self) -> NetworkCommunicator:
        lane = NetworkCommunicator(
            self.rank,
            self.hosts,
            self._network,
            self._world_ranks,
            ids=[self._id | 1 << 31],
            timeout_s=self.timeout_s,
            ledger=self.ledger,
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

    def start_all_reduce(
        self, tensor: torch.Tensor, op: ReduceOp, options: CallOptions = DEFAULT_OPTIONS
    ) -> Work:
        name = options.algorithm or self.algorithm_for("all_reduce", tensor.numel() * tensor.itemsize)
        if name == DIRECT:
            return super().start_all_reduce(tensor, op, options)
        shares = uneven.parse(name, self.size)
        if shares is not None:
            counts = uneven.counts(tensor.numel(), shares)
            return self._combine(
                "all_reduce", Kind.ALL_REDUCE, tensor, tensor, 0, op, counts, options=options
            )
        return self._run(
            name,
            "all_reduce",
            Kind.ALL_REDUCE,
            tensor,
            tensor,
            tensor.numel(),
            op=op,
            options=options,
        )

    def start_reduce(
        self, tensor: torch.Tensor, root: Rank, op: ReduceOp, options: CallOptions = DEFAULT_OPTIONS
    ) -> Work:
        program = self._program("reduce", tensor, options)
        if program is None:
            return super().start_reduce(tensor, root, op, options)
        return self._run(
            program,
            "reduce",
            Kind.REDUCE,
            tensor,
            tensor,
            tensor.numel(),
            root=root,
            op=op,
            options=options,
        )

    def start_broadcast(
        self, tensor: torch.Tensor, root: Rank, options: CallOptions = DEFAULT_OPTIONS
    ) -> Work:
        program = self._program("broadcast", tensor, options)
        if program is None:
            return super().start_broadcast(tensor, root, options)
        return self._run(
            program,
            "broadcast",
            Kind.BROADCAST,
            tensor,
            tensor,
            tensor.numel(),
            root=root,
            options=options,
        )

    def start_all_gather(
        self, output: torch.Tensor, source: torch.Tensor, options: CallOptions = DEFAULT_OPTIONS
    ) -> Work:
        program = self._program("all_gather", output, options)
        if program is None:
            return super().start_all_gather(output, source, options)
        return self._run(
            program, "all_gather", Kind.ALL_GATHER, output, source, source.numel(), options=options
        )

    def start_all_gather_v(
        self,
        output: torch.Tensor,
        source: torch.Tensor,
        counts: Sequence[int],
        options: CallOptions = DEFAULT_OPTIONS,
    ) -> Work:
        program = self._program("all_gather", output, options)
        if program is None:
            return super().start_all_gather_v(output, source, counts, options)
        return self._run(
            program, "all_gather_v", Kind.ALL_GATHER, output, source, tuple(counts), options=options
        )

    def start_reduce_scatter(
        self, output: torch.Tensor, source: torch.Tensor, op: ReduceOp, options: CallOptions = DEFAULT_OPTIONS
    ) -> Work:
        program = self._program("reduce_scatter", source, options)
        if program is None:
            return super().start_reduce_scatter(output, source, op, options)
        kind = Kind.REDUCE_SCATTER
        return self._run(
            program, "reduce_scatter", kind, output, source, output.numel(), op=op, options=options
        )

    def start_reduce_scatter_v(
        self,
        output: torch.Tensor,
        source: torch.Tensor,
        counts: Sequence[int],
        op: ReduceOp,
        options: CallOptions = DEFAULT_OPTIONS,
    ) -> Work:
        program = self._program("reduce_scatter", source, options)
        if program is None:
            return super().start_reduce_scatter_v(output, source, counts, op, options)
        kind = Kind.REDUCE_SCATTER
        return self._run(
            program, "reduce_scatter_v", kind, output, source, tuple(counts), op=op, options=options
        )

    def _program(self, operation: str, whole: torch.Tensor, options: CallOptions) -> str | None:
        """Name of the program to run, None for the core's own algorithm."""
        name = options.algorithm or self.algorithm_for(operation, whole.numel() * whole.itemsize)
        return None if name == DIRECT or uneven.parse(name, self.size) is not None else name

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
        options: CallOptions,
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
                self.deadline_s(options),
            )
        except CommError as error:
            return self.failed(error)
        return DONE if started is None else self.pending(started, (output, source))

    def make_part(self, ranks: list[Rank]) -> NetworkCommunicator | None:
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

    def release(self) -> None:
        self.ledger.wire_bytes = self._network.wire_bytes
        super().release()
        if self._is_world:
            self._network.close()
