"""Collectives of the simulated fabric: computed exactly, in rank order, once all have come; then costed.

Operations of one group run one after the other, as on a real communicator. What each operation does to the
ranks' tensors is a small function over their arguments in rank order.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from paceline.comm.ledger import Ledger
from paceline.comm.simulated.clock import Signal
from paceline.comm.simulated.cluster import VirtualCluster, wait
from paceline.comm.simulated.faults import FOREVER
from paceline.errors import CommError, Mismatch, PeerLost, Timeout
from paceline.types import Rank

Arguments = dict[Rank, Any]
Apply = Callable[[Arguments], None]


class SimulatedWork:
    """An operation in flight in virtual time."""

    def __init__(self, signal: Signal, what: Callable[[], str], ledger: Ledger) -> None:
        self._signal, self._what, self._ledger = signal, what, ledger
        self.error: BaseException | None = None

    def wait(self, timeout_s: float | None = None) -> None:
        """Block in virtual time until done. Raises the operation's error, or Timeout."""
        if not self._signal.is_set:
            wait(self._signal, self._what, timeout_s, self._ledger)
        if self.error is not None:
            raise self.error

    def is_done(self) -> bool:
        """Whether `wait` would return (or raise) at once."""
        return self._signal.is_set

    def exception(self) -> BaseException | None:
        """The error of a finished operation, else None."""
        return self.error if self._signal.is_set else None

    def finish(self, error: BaseException | None = None) -> None:
        """Mark as done."""
        self.error = error
        self._signal.set()


@dataclass
class _Operation:
    index: int
    name: str
    signature: tuple[Any, ...]
    num_bytes: int
    apply: Apply
    algorithm: str = ""
    works: dict[Rank, SimulatedWork] = field(default_factory=dict)
    arguments: Arguments = field(default_factory=dict)


class SimulatedGroup:
    """The ranks of one communicator. `members[i]` is the cluster rank of group rank i."""

    def __init__(self, cluster: VirtualCluster, members: Sequence[int]) -> None:
        self.cluster = cluster
        self.members = list(members)
        self.tolerates_loss = False
        """Whether later collectives go on among the living; otherwise they raise PeerLost."""
        self._next = [0] * len(self.members)
        self._pending: dict[int, _Operation] = {}
        self._free_s = 0.0
        self._subgroups: dict[tuple, SimulatedGroup] = {}
        self._sent: dict[tuple[int, int, int], deque] = defaultdict(deque)
        self._wanted: list[tuple[int, int | None, int, torch.Tensor, SimulatedWork]] = []
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

    def submit(
        self,
        rank: Rank,
        name: str,
        signature: tuple[Any, ...],
        num_bytes: int,
        argument: Any,
        apply: Apply,
        ledger: Ledger,
        algorithm: str = "",
    ) -> SimulatedWork:
        """Join the caller's next collective; it starts when the last rank has come."""
        self.cluster.world.refuse_in_handler(name)
        index = self._next[rank]
        self._next[rank] += 1
        operation = self._pending.get(index)
        if operation is None:
            operation = self._pending[index] = _Operation(index, name, signature, num_bytes, apply, algorithm)
        work = SimulatedWork(Signal(self.cluster.world), partial(self._describe, operation), ledger)
        operation.works[rank] = work
        operation.arguments[rank] = argument
        if (operation.name, operation.signature) != (name, signature):
            first = min(r for r in operation.works if r != rank)
            self._fail(
                operation,
                Mismatch(
                    f"collective #{index}: rank {rank} called {name}{signature}, rank {first} "
                    f"called {operation.name}{operation.signature}; "
                    "all ranks must call the same ones in the same order"
                ),
            )
        elif self.lost() and not self.tolerates_loss:
            self._fail(operation, self._lost_error(operation))
        else:
            self._start_if_complete(operation)
        return work

    def send(self, src: Rank, dst: Rank, tag: int, tensor: torch.Tensor, ledger: Ledger) -> SimulatedWork:
        """Point to point; the work is done when the bytes have arrived."""
        cluster = self.cluster
        work = SimulatedWork(Signal(cluster.world), lambda: f"its send to rank {dst} (tag {tag})", ledger)
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
        """Point to point; `src` None takes from any rank, the lowest that has sent something."""
        source = "any rank" if src is None else f"rank {src}"
        work = SimulatedWork(
            Signal(self.cluster.world), lambda: f"its receive from {source} (tag {tag})", ledger
        )
        self._wanted.append((dst, src, tag, tensor, work))
        self._match()
        if src is not None and src in self.lost() and not work.is_done():
            work.finish(PeerLost(f"rank {dst}: rank {src} is lost: its process ended"))
        return work

    def _match(self) -> None:
        for entry in list(self._wanted):
            dst, src, tag, tensor, work = entry
            sources = range(len(self.members)) if src is None else [src]
            for s in sources:
                queue = self._sent.get((s, dst, tag))
                if queue:
                    self._wanted.remove(entry)
                    sent = queue.popleft()
                    if sent.numel() != tensor.numel() or sent.dtype != tensor.dtype:
                        got = f"{sent.numel()} x {sent.dtype}"
                        work.finish(
                            Mismatch(
                                f"rank {dst}: receive of {tensor.numel()} x {tensor.dtype} "
                                f"from rank {s} got {got}"
                            )
                        )
                    else:
                        tensor.copy_(sent.view_as(tensor))
                        work.finish()
                    break

    # -- completion ----------------------------------------------------------------------------------------

    def _start_if_complete(self, operation: _Operation) -> None:
        if len(operation.works) < len(self.members) - len(self.lost() - set(operation.works)):
            return
        del self._pending[operation.index]
        cluster, arrived = self.cluster, sorted(operation.works)
        ranks = [self.members[r] for r in arrived]
        start, why = cluster.network.collective_start(ranks, max(cluster.world.now, self._free_s))
        if start == FOREVER:
            at = f"at {cluster.world.now:.6f} s (virtual)"
            self._finish_all(operation, Timeout(f"{self._describe(operation)} {at}: {why}"))
            return
        try:
            operation.apply({r: operation.arguments[r] for r in arrived})
        except CommError as error:
            self._finish_all(operation, error)
            return
        seconds = 0.0
        if not cluster.off_clock.intersection(self.members):
            wanted = (operation.name, operation.num_bytes, ranks, operation.algorithm)
            seconds = cluster.network.collective_s(*wanted)
        self._free_s = start + seconds
        for r in arrived:
            cluster.log.add(
                "collective",
                operation.name,
                self.members[r],
                start,
                self._free_s,
                num_bytes=operation.num_bytes,
            )
        if seconds == 0 and start == cluster.world.now:
            self._finish_all(operation, None)
        else:
            cluster.world.at(
                self._free_s, self.members[arrived[0]], partial(self._finish_all, operation, None)
            )

    def _finish_all(self, operation: _Operation, error: BaseException | None) -> None:
        for rank in sorted(operation.works):
            operation.works[rank].finish(error)

    def _fail(self, operation: _Operation, error: CommError) -> None:
        self._finish_all(operation, error)

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
                self._fail(operation, self._lost_error(operation))
        for entry in list(self._wanted):
            if entry[1] == lost:
                self._wanted.remove(entry)
                entry[4].finish(PeerLost(f"rank {entry[0]}: rank {lost} is lost: its process ended"))

    def _lost_error(self, operation: _Operation) -> PeerLost:
        names = ", ".join(str(r) for r in sorted(self.lost()))
        return PeerLost(
            f"{operation.name} #{operation.index}: rank {names} is lost: its process ended. "
            "Continue with the others by shrinking the communicator, or resume from a checkpoint"
        )

    def _describe(self, operation: _Operation) -> str:
        missing = sorted(set(range(len(self.members))) - set(operation.works) - self.lost())
        who = ", ".join(str(r) for r in missing[:8]) + (" …" if len(missing) > 8 else "")
        return f"{operation.name} #{operation.index}" + (f" (not called by rank {who})" if missing else "")
