"""The simulated fabric: one virtual worker's Communicator; `paceline.comm.simulated.simulate` runs them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from paceline import collectives
from paceline.comm.communicator import FabricCommunicator
from paceline.comm.messages import framing
from paceline.comm.reference_operations import ReferenceCall, ReferenceOperations, argument
from paceline.comm.simulated.cluster import SimulatedReply
from paceline.comm.simulated.group import CollectiveCall, SimulatedGroup, SimulatedWork
from paceline.types import DEFAULT_OPTIONS, CallOptions, Handler, Message, Rank


class SimulatedCommunicator(ReferenceOperations, FabricCommunicator):
    """One virtual worker's view of a group of virtual workers."""

    fabric = "simulated"

    def __init__(self, group: SimulatedGroup, rank: Rank, name: str = "") -> None:
        super().__init__(rank, len(group.members), [group.cluster.host(r) for r in group.members])
        self._group, self._cluster, self._name = group, group.cluster, name
        self._own = group.members[rank]
        self._num_splits = 0
        self._algorithm = ""
        self.ledger.wire_bytes = 0

    # Collectives

    def perform(self, call: ReferenceCall) -> SimulatedWork:
        self._cluster.clock.settle()
        own = argument(call.source, call.target, call.counts, is_in_place=call.source is call.target)
        signature = (*call.signature, self._algorithm)
        return self._group.submit(
            self.rank,
            CollectiveCall(
                call.name, signature, call.num_bytes, own, call.apply, self.ledger, self._algorithm
            ),
        )

    def start_send(
        self, tensor: torch.Tensor, dst: Rank, tag: int, options: CallOptions = DEFAULT_OPTIONS
    ) -> SimulatedWork:
        self._cluster.clock.settle()
        self._count_wire(dst, tensor.nbytes)
        return self._group.send(self.rank, dst, tag, tensor, self.ledger)

    def start_recv(
        self, tensor: torch.Tensor, src: Rank | None, tag: int, options: CallOptions = DEFAULT_OPTIONS
    ) -> SimulatedWork:
        self._cluster.clock.settle()
        return self._group.recv(self.rank, src, tag, tensor, self.ledger)

    # Messages

    def register_handler(self, channel: str, handler: Handler) -> None:
        members, ledger = self._group.members, self.ledger
        self._cluster.serve(
            self._own, self._name + channel, lambda src, m: handler(members.index(src), m), ledger
        )

    def send_call(self, peer: Rank, channel: str, message: Message) -> SimulatedReply:
        self._cluster.clock.settle()
        reply = self._cluster.call(self._own, self._group.members[peer], self._name + channel, message)
        reply.ledger = self.ledger
        self._count_wire(peer, framing.num_bytes(message))
        return reply

    def send_post(self, peer: Rank, channel: str, message: Message) -> None:
        self._cluster.clock.settle()
        self._cluster.post(self._own, self._group.members[peer], self._name + channel, message)
        self._count_wire(peer, framing.num_bytes(message))

    def deferred(self) -> SimulatedReply:
        """Return a promise that a handler returns now and sets later."""
        return SimulatedReply(self._cluster.clock)

    def on_lost(self, callback: Callable[[Rank], None]) -> None:
        """Call `callback(rank)`, as a handler, when a peer's death is noticed."""
        members = self._group.members
        self._cluster.on_lost(self._own, lambda r: callback(members.index(r)) if r in members else None)

    def drain(self) -> None:
        """Collective: return when every message posted before, and by its handlers, has been handled."""
        self._cluster.clock.settle()
        for _ in range(2):
            self._cluster.drain(self._own)
            self.barrier().wait()
        self._cluster.raise_stored(self._own)

    # Time and groups

    def charge_compute(self, share: float = 1.0) -> None:
        """Let `share` of one minibatch's compute time pass."""
        self._cluster.clock.settle()
        self._cluster.compute(self._own, share)

    def tolerate_loss(self) -> None:
        """From now on collectives continue among the living: reductions combine the ranks that take part."""
        self._group.tolerates_loss = True

    @contextlib.contextmanager
    def using(self, algorithm: str) -> Iterator[None]:
        """Collectives that start inside cost what `algorithm` costs; the same on all ranks. ConfigError."""
        collectives.find(algorithm)
        before, self._algorithm = self._algorithm, algorithm
        try:
            yield
        finally:
            self._algorithm = before

    @contextlib.contextmanager
    def off_clock(self) -> Iterator[None]:
        """Operations that start inside take no virtual time: evaluation."""
        self._cluster.clock.settle()
        self._cluster.off_clock.add(self._own)
        try:
            yield
        finally:
            self._cluster.off_clock.discard(self._own)

    def allocate(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Zeroed 1-D tensor in ordinary memory."""
        return torch.zeros(numel, dtype=dtype)

    def now(self) -> float:
        """Seconds of the virtual clock."""
        self._cluster.clock.settle()
        return self._cluster.clock.now

    def make_part(self, ranks: list[Rank]) -> SimulatedCommunicator | None:
        self._num_splits += 1
        self.barrier().wait()
        if self.rank not in ranks:
            return None
        group = self._group.subgroup(tuple(ranks), self._num_splits)
        name = f"{self._name}{self._num_splits}:{'-'.join(map(str, ranks))}/"
        return SimulatedCommunicator(group, ranks.index(self.rank), name)

    def release(self) -> None:
        pass

    def _count_wire(self, peer: Rank, num_bytes: int) -> None:
        if peer != self.rank and self.ledger.wire_bytes is not None:
            self.ledger.wire_bytes += num_bytes + self._cluster.network.header_bytes
