"""Collectives of the simulated fabric.

A collective starts when its last rank has called it. Its result is computed at once, exactly and in rank
order, by a small function over the ranks' arguments; then the time that it takes on the network passes.
Operations of one group run one after the other, as on a real communicator.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from paceline.comm.ledger import Ledger
from paceline.comm.reference_operations import Apply, Arguments
from paceline.comm.simulated.clock import Signal
from paceline.comm.simulated.cluster import SimulatedCluster, wait
from paceline.comm.simulated.faults import FOREVER
from paceline.errors import CommError, Mismatch, PeerLost, Timeout
from paceline.types import Rank


@dataclass(slots=True)
class CollectiveCall:
    """One rank's call of a collective."""

    name: str
    signature: tuple[object, ...]
    """What all ranks must agree on."""
    num_bytes: int
    """Size of the full buffer of one rank, which the time is computed from."""
    argument: object
    """This rank's entry in the `Arguments` of `apply`."""
    apply: Apply
    ledger: Ledger
    """Where waiting time is counted."""
    algorithm: str = ""
    """The algorithm whose time it takes; "" for the fastest."""


class SimulatedWork:
    """An operation in flight in virtual time."""

    def __init__(self, signal: Signal, awaited: Callable[[], str], ledger: Ledger) -> None:
        self._signal, self._awaited, self._ledger = signal, awaited, ledger
        self.error: BaseException | None = None

    def wait(self, timeout_s: float | None = None) -> None:
        """Block in virtual time until done. Raises the operation's error, or Timeout."""
        if not self._signal.is_set:
            wait(self._signal, self._awaited, timeout_s, self._ledger)
        if self.error is not None:
            raise self.error

    def is_done(self) -> bool:
        """Whether `wait` would return (or raise) at once."""
        return self._signal.is_set

    def exception(self) -> BaseException | None:
        """The error of a finished operation, else None."""
        return self.error if self._signal.is_set else None

    def finish(self, error: BaseException | None = None) -> None:
        """Mark as done, with the error that `wait` raises, if any."""
        self.error = error
        self._signal.set()


@dataclass
class _Collective:
    """A collective that some ranks have called."""

    index: int
    first: CollectiveCall
    """The call of the rank that came first."""
    works: dict[Rank, SimulatedWork] = field(default_factory=dict)
    arguments: Arguments = field(default_factory=dict)


@dataclass(eq=False)
class _Receive:
    """A receive whose message has not arrived."""

    dst: Rank
    src: Rank | None
    """None: from any rank."""
    tag: int
    tensor: torch.Tensor
    work: SimulatedWork


class SimulatedGroup:
    """The ranks of one communicator. `members[i]` is the cluster rank of group rank i."""

    def __init__(self, cluster: SimulatedCluster, members: Sequence[int]) -> None:
        self.cluster = cluster
        self.members = list(members)
        self.tolerates_loss = False
        """Whether collectives continue among the living ranks after a death, instead of raising PeerLost."""
        self._next = [0] * len(self.members)
        self._pending: dict[int, _Collective] = {}
        self._free_s = 0.0
        """When the last collective ends."""
        self._subgroups: dict[tuple, SimulatedGroup] = {}
        self._sent: dict[tuple[int, int, int], deque[torch.Tensor]] = defaultdict(deque)
        """Messages that have arrived before their receive, by source, destination and tag."""
        self._receives: list[_Receive] = []
        cluster.on_kill.append(self._on_kill)

    def lost(self) -> set[Rank]:
        """Group ranks known to be dead."""
        if not self.cluster.lost:
            return set()
        return {i for i, r in enumerate(self.members) if r in self.cluster.lost}

    def subgroup(self, ranks: tuple[int, ...], serial: int) -> SimulatedGroup:
        """Return the one group object of `ranks` for the `serial`-th split."""
        key = (serial, ranks)
        if key not in self._subgroups:
            self._subgroups[key] = SimulatedGroup(self.cluster, [self.members[r] for r in ranks])
        return self._subgroups[key]

    def submit(self, rank: Rank, call: CollectiveCall) -> SimulatedWork:
        """Join the next collective of `rank`; it starts when the last rank has called it."""
        self.cluster.clock.refuse_in_handler(call.name)
        index = self._next[rank]
        self._next[rank] += 1
        operation = self._pending.get(index)
        if operation is None:
            operation = self._pending[index] = _Collective(index, call)
        work = SimulatedWork(Signal(self.cluster.clock), partial(self._describe, operation), call.ledger)
        operation.works[rank] = work
        operation.arguments[rank] = call.argument
        expected = operation.first
        if (expected.name, expected.signature) != (call.name, call.signature):
            first = min(r for r in operation.works if r != rank)
            self._finish_all(
                operation,
                Mismatch(
                    f"collective #{index}: rank {rank} called {call.name}{call.signature}, rank {first} "
                    f"called {expected.name}{expected.signature}; "
                    "all ranks must call the same ones in the same order"
                ),
            )
        elif self.lost() and not self.tolerates_loss:
            self._finish_all(operation, self._lost_error(operation))
        else:
            self._start_if_complete(operation)
        return work

    def send(self, src: Rank, dst: Rank, tag: int, tensor: torch.Tensor, ledger: Ledger) -> SimulatedWork:
        """Send to `dst`; the work is done when the bytes have arrived."""
        cluster = self.cluster
        work = SimulatedWork(Signal(cluster.clock), lambda: f"its send to rank {dst} (tag {tag})", ledger)
        if dst in self.lost():
            work.finish(PeerLost(f"rank {src}: rank {dst} is lost: its process ended"))
            return work
        size = tensor.numel() * tensor.element_size()
        copy = tensor.detach().clone()

        def arrive() -> None:
            self._sent[src, dst, tag].append(copy)
            self._match()
            work.finish()

        cluster.carry(self.members[src], self.members[dst], "send", size, arrive)
        return work

    def recv(
        self, dst: Rank, src: Rank | None, tag: int, tensor: torch.Tensor, ledger: Ledger
    ) -> SimulatedWork:
        """Receive from `src`; None takes from any rank, the lowest of those that have sent."""
        source = "any rank" if src is None else f"rank {src}"
        work = SimulatedWork(
            Signal(self.cluster.clock), lambda: f"its receive from {source} (tag {tag})", ledger
        )
        self._receives.append(_Receive(dst, src, tag, tensor, work))
        self._match()
        if src is not None and src in self.lost() and not work.is_done():
            work.finish(PeerLost(f"rank {dst}: rank {src} is lost: its process ended"))
        return work

    def _match(self) -> None:
        """Complete the receives whose message is there."""
        for receive in list(self._receives):
            sources = range(len(self.members)) if receive.src is None else [receive.src]
            for src in sources:
                queue = self._sent.get((src, receive.dst, receive.tag))
                if queue:
                    self._receives.remove(receive)
                    _complete(receive, src, queue.popleft())
                    break

    # Completion

    def _start_if_complete(self, operation: _Collective) -> None:
        if len(operation.works) < len(self.members) - len(self.lost() - set(operation.works)):
            return
        del self._pending[operation.index]
        cluster, call, arrived = self.cluster, operation.first, sorted(operation.works)
        ranks = [self.members[r] for r in arrived]
        start, why = cluster.network.collective_start(ranks, max(cluster.clock.now, self._free_s))
        if start == FOREVER:
            at = f"at {cluster.clock.now:.6f} s (virtual)"
            self._finish_all(operation, Timeout(f"{self._describe(operation)} {at}: {why}"))
            return
        try:
            operation.first.apply({r: operation.arguments[r] for r in arrived})
        except CommError as error:
            self._finish_all(operation, error)
            return
        seconds = 0.0
        if not cluster.off_clock.intersection(self.members):
            seconds = cluster.network.collective_s(call.name, call.num_bytes, ranks, call.algorithm)
        self._free_s = start + seconds
        for r in arrived:
            cluster.log.add(
                "collective",
                call.name,
                self.members[r],
                start,
                self._free_s,
                num_bytes=call.num_bytes,
            )
        if seconds == 0 and start == cluster.clock.now:
            self._finish_all(operation, None)
        else:
            cluster.clock.at(
                self._free_s, self.members[arrived[0]], partial(self._finish_all, operation, None)
            )

    def _finish_all(self, operation: _Collective, error: BaseException | None) -> None:
        for rank in sorted(operation.works):
            operation.works[rank].finish(error)

    def _on_kill(self, rank: int) -> None:
        if rank not in self.members:
            return
        lost = self.members.index(rank)
        for operation in [self._pending[i] for i in sorted(self._pending)]:
            if lost in operation.works:
                continue
            if self.tolerates_loss:
                self._start_if_complete(operation)
            else:
                self._finish_all(operation, self._lost_error(operation))
        for receive in list(self._receives):
            if receive.src == lost:
                self._receives.remove(receive)
                text = f"rank {receive.dst}: rank {lost} is lost: its process ended"
                receive.work.finish(PeerLost(text))

    def _lost_error(self, operation: _Collective) -> PeerLost:
        names = ", ".join(str(r) for r in sorted(self.lost()))
        return PeerLost(
            f"{operation.first.name} #{operation.index}: rank {names} is lost: its process ended. "
            "Continue with the others by shrinking the communicator, or resume from a checkpoint"
        )

    def _describe(self, operation: _Collective) -> str:
        missing = sorted(set(range(len(self.members))) - set(operation.works) - self.lost())
        who = ", ".join(str(r) for r in missing[:8]) + (" …" if len(missing) > 8 else "")
        absent = f" (not called by rank {who})" if missing else ""
        return f"{operation.first.name} #{operation.index}{absent}"


def _complete(receive: _Receive, src: Rank, sent: torch.Tensor) -> None:
    tensor = receive.tensor
    if sent.numel() != tensor.numel() or sent.dtype != tensor.dtype:
        receive.work.finish(
            Mismatch(
                f"rank {receive.dst}: receive of {tensor.numel()} x {tensor.dtype} "
                f"from rank {src} got {sent.numel()} x {sent.dtype}"
            )
        )
        return
    tensor.copy_(sent.view_as(tensor))
    receive.work.finish()
