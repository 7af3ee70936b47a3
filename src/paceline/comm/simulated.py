"""The simulated fabric: a deterministic virtual cluster that runs the same code as real processes.

    run = paceline.simulate(train, num_workers=32, compute="pareto(shape=3)", network="ethernet(gbit=1)")
    run[0]              what worker 0 returned
    run.seconds         virtual seconds until the last worker was done
    run.log.digest()    the same for the same seed

Gradients are real, the clock is not: a minibatch takes a drawn time, messages and collectives take what the
network makes of them. One worker runs at a time, so one core is enough and nothing depends on thread timing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from paceline.comm import compute_time, current, faults
from paceline.comm.event_log import EventLog
from paceline.comm.simulated_group import Apply, SimulatedGroup, SimulatedWork, reduced
from paceline.comm.simulated_network import Network
from paceline.comm.virtual_cluster import SimulatedReply, VirtualCluster
from paceline.comm.virtual_time import World
from paceline.errors import ConfigError, Mismatch, PeerLost
from paceline.schedule import topology
from paceline.types import Handler, Message, Rank, ReduceOp


@dataclass(frozen=True)
class SimulatedRun(Sequence[Any]):
    """The workers' results in rank order (None where one was killed), and what happened."""

    results: list[Any]
    seconds: float
    """Virtual seconds from the start to the end of the last worker."""
    killed: list[int]
    num_events: int
    log: EventLog

    def __getitem__(self, index: Any) -> Any:
        return self.results[index]

    def __len__(self) -> int:
        return len(self.results)


def simulate(
    fn: Callable[..., Any],
    *,
    num_workers: int,
    args: Sequence[Any] = (),
    compute: str = "constant",
    network: str = "ethernet",
    seed: int = 0,
    faults: str = "",
    speeds: Sequence[float] | None = None,
    detect_s: float = 0.0,
    log: str | None = None,
    trace: str | None = None,
    record: bool = True,
) -> SimulatedRun:
    """Run `fn(*args)` on `num_workers` virtual workers; inside, `paceline.init()` joins the virtual cluster.

    `compute`: seconds per minibatch, a distribution (see `paceline.comm.compute_time`); `speeds[r]` divides
    them for worker r. `network`: see `paceline.schedule.topology`. `faults`: see `paceline.comm.faults`;
    a death is noticed `detect_s` later. `log`, `trace`: files for the event log (JSON lines) and the
    Chrome/Perfetto trace; `record=False` keeps no events. Raises what a worker raised, or CommError with who
    waits for whom when nobody can go on.
    """
    if num_workers < 1:
        raise ConfigError(f"num_workers={num_workers}: at least 1 expected")
    if speeds is not None and (len(speeds) != num_workers or min(speeds) <= 0):
        raise ConfigError(f"speeds: {num_workers} numbers above 0 expected, got {list(speeds)}")
    script = parse_faults(faults, num_workers=num_workers, seed=seed)
    world = World(seed)
    events = EventLog(is_recording=record or bool(log or trace))
    cluster = VirtualCluster(
        world,
        num_workers=num_workers,
        network=Network(topology.parse(network, num_ranks=num_workers), script),
        compute=compute_time.parse(compute),
        speeds=list(speeds or [1.0] * num_workers),
        faults=script,
        log=events,
        seed=seed,
        detect_s=detect_s,
    )
    group = SimulatedGroup(cluster, range(num_workers))

    def body(rank: int) -> Any:
        current.provide(SimulatedCommunicator(group, rank))
        try:
            return fn(*args)
        finally:
            current.provide(None)

    start_s = [script.joins.get(r, 0.0) for r in range(num_workers)]
    try:
        results = world.run([partial(body, r) for r in range(num_workers)], start_s)
    finally:
        if log:
            events.write(log)
        if trace:
            events.write_trace(trace)
    killed = [w.rank for w in world.workers if w.is_killed]
    return SimulatedRun(results, world.now, killed, world.num_events, events)


parse_faults = faults.parse


class SimulatedCommunicator:
    """One virtual worker's view of a group."""

    fabric = "simulated"

    def __init__(self, group: SimulatedGroup, rank: Rank, name: str = "") -> None:
        self.rank = rank
        self.size = len(group.members)
        self.hosts = [f"virtual-{r}" for r in group.members]
        self._group, self._cluster, self._name = group, group.cluster, name
        self._num_splits = 0

    # -- collectives ---------------------------------------------------------------------------------------

    def all_reduce(self, tensor: torch.Tensor, *, op: ReduceOp = ReduceOp.SUM) -> SimulatedWork:
        """In place: every rank gets the combination of all."""
        return self._submit("all_reduce", (_kind(tensor), op.value), tensor, tensor, partial(_all_reduce, op))

    def reduce(self, tensor: torch.Tensor, *, root: Rank = 0, op: ReduceOp = ReduceOp.SUM) -> SimulatedWork:
        """In place: the root gets the combination of all."""
        apply = partial(_reduce, op, root)
        return self._submit("reduce", (_kind(tensor), root, op.value), tensor, tensor, apply)

    def broadcast(self, tensor: torch.Tensor, *, root: Rank = 0) -> SimulatedWork:
        """In place: every rank gets the root's tensor."""
        return self._submit("broadcast", (_kind(tensor), root), tensor, tensor, partial(_broadcast, root))

    def all_gather(self, output: torch.Tensor, source: torch.Tensor) -> SimulatedWork:
        """`output` (P x source) gets every rank's `source`, in rank order."""
        counts = [source.numel()] * self.size
        return self._gather("all_gather", output, source, counts, None)

    def all_gather_v(
        self, output: torch.Tensor, source: torch.Tensor, *, counts: Sequence[int]
    ) -> SimulatedWork:
        """As all_gather; rank r gives `counts[r]` elements."""
        return self._gather("all_gather", output, source, list(counts), None)

    def gather(self, output: torch.Tensor | None, source: torch.Tensor, *, root: Rank = 0) -> SimulatedWork:
        """The root's `output` (P x source) gets every rank's `source`."""
        return self._gather("gather", output, source, [source.numel()] * self.size, root)

    def reduce_scatter(
        self, output: torch.Tensor, source: torch.Tensor, *, op: ReduceOp = ReduceOp.SUM
    ) -> SimulatedWork:
        """`output` gets this rank's slice of the combination of all `source` (P x output)."""
        return self.reduce_scatter_v(output, source, counts=[output.numel()] * self.size, op=op)

    def reduce_scatter_v(
        self,
        output: torch.Tensor,
        source: torch.Tensor,
        *,
        counts: Sequence[int],
        op: ReduceOp = ReduceOp.SUM,
    ) -> SimulatedWork:
        """As reduce_scatter; rank r gets `counts[r]` elements."""
        _check_counts("reduce_scatter", counts, source, output, counts[self.rank])
        apply = partial(_reduce_scatter, op, list(counts))
        signature = (_kind(source), tuple(counts), op.value)
        return self._submit("reduce_scatter", signature, source, (output, source), apply)

    def scatter(self, output: torch.Tensor, source: torch.Tensor | None, *, root: Rank = 0) -> SimulatedWork:
        """Rank r's `output` gets slice r of the root's `source`."""
        if self.rank == root and (source is None or source.numel() != self.size * output.numel()):
            raise Mismatch(f"scatter: the root's source must have {self.size} x {output.numel()} elements")
        whole = source if source is not None else output.new_empty(output.numel() * self.size)
        apply = partial(_scatter, root)
        return self._submit("scatter", (_kind(output), root), whole, (output, source), apply)

    def all_to_all(self, output: torch.Tensor, source: torch.Tensor) -> SimulatedWork:
        """Rank r gets slice r of every rank's `source`."""
        counts = [source.numel() // self.size] * self.size
        return self.all_to_all_v(output, source, output_counts=counts, source_counts=counts)

    def all_to_all_v(
        self,
        output: torch.Tensor,
        source: torch.Tensor,
        *,
        output_counts: Sequence[int],
        source_counts: Sequence[int],
    ) -> SimulatedWork:
        """Rank r gives `source_counts[d]` elements to rank d and gets `output_counts[s]` from rank s."""
        _check_counts("all_to_all", source_counts, source, output, sum(output_counts))
        argument = (output, source, list(output_counts), list(source_counts))
        return self._submit("all_to_all", (str(source.dtype),), source, argument, _all_to_all)

    def barrier(self) -> SimulatedWork:
        """Done when every rank has called it."""
        return self._submit("barrier", (), torch.empty(0), None, lambda arguments: None)

    def send(self, tensor: torch.Tensor, dst: Rank, *, tag: int = 0) -> SimulatedWork:
        """Point to point."""
        return self._group.send(self.rank, dst, tag, tensor)

    def recv(self, tensor: torch.Tensor, src: Rank | None = None, *, tag: int = 0) -> SimulatedWork:
        """Point to point; `src` None takes from any rank."""
        return self._group.recv(self.rank, src, tag, tensor)

    # -- messages ------------------------------------------------------------------------------------------

    def serve(self, channel: str, handler: Handler) -> None:
        """Run `handler(src, message)` for every message on `channel`; it must not wait."""
        own = self._group.members
        self._cluster.serve(
            own[self.rank], self._name + channel, lambda src, message: handler(own.index(src), message)
        )

    def call(self, peer: Rank, channel: str, message: Message) -> SimulatedReply:
        """Send a request and return the promise of its answer."""
        src, dst = self._pair(peer)
        return self._cluster.call(src, dst, self._name + channel, message)

    def post(self, peer: Rank, channel: str, message: Message) -> None:
        """Send a message that is not answered."""
        src, dst = self._pair(peer)
        self._cluster.post(src, dst, self._name + channel, message)

    def deferred(self) -> SimulatedReply:
        """Return a promise that a handler returns now and sets later."""
        return SimulatedReply(self._cluster.world)

    def on_lost(self, callback: Callable[[Rank], None]) -> None:
        """Call `callback(rank)` when a peer's death is noticed."""
        members = self._group.members
        self._cluster.on_lost(
            members[self.rank], lambda r: callback(members.index(r)) if r in members else None
        )

    def drain(self) -> None:
        """Collective: return when every message posted before, and by its handlers, has been handled."""
        for _ in range(2):
            self._cluster.drain(self._group.members[self.rank])
            self.barrier().wait()
        self._cluster.raise_stored(self._group.members[self.rank])

    # -- the rest ------------------------------------------------------------------------------------------

    def charge_compute(self) -> None:
        """Let one minibatch's compute time pass."""
        self._cluster.compute(self._group.members[self.rank])

    def tolerate_loss(self) -> None:
        """From now on collectives go on among the living (reductions over those who came)."""
        self._group.tolerates_loss = True

    @contextlib.contextmanager
    def off_clock(self) -> Iterator[None]:
        """Operations inside take no virtual time (evaluation)."""
        group = self._group
        group.off_clock += 1
        try:
            yield
        finally:
            group.off_clock -= 1

    def allocate(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Zeroed 1-D tensor."""
        return torch.zeros(numel, dtype=dtype)

    def now(self) -> float:
        """Virtual seconds."""
        return self._cluster.world.now

    def split(self, ranks: Sequence[Rank]) -> SimulatedCommunicator | None:
        """A communicator of `ranks` (all must call it); None on ranks that are not in it."""
        self._num_splits += 1
        self.barrier().wait()
        if self.rank not in ranks:
            return None
        group = self._group.subgroup(tuple(ranks), self._num_splits)
        name = f"{self._name}{self._num_splits}:{'-'.join(map(str, ranks))}/"
        return SimulatedCommunicator(group, list(ranks).index(self.rank), name)

    def close(self) -> None:
        """Nothing to release."""

    def _submit(
        self, name: str, signature: tuple, buffer: torch.Tensor, argument: Any, apply: Apply
    ) -> SimulatedWork:
        size = buffer.numel() * buffer.element_size()
        return self._group.submit(self.rank, name, signature, size, argument, apply)

    def _gather(
        self,
        name: str,
        output: torch.Tensor | None,
        source: torch.Tensor,
        counts: list[int],
        root: Rank | None,
    ) -> SimulatedWork:
        if root is None or root == self.rank:
            if output is None:
                raise Mismatch(f"{name}: rank {self.rank} is the root and must give an output")
            _check_counts(name, counts, output, source, counts[self.rank])
        whole = output if output is not None else source.new_empty(sum(counts))
        signature = (str(source.dtype), tuple(counts), root)
        return self._submit(name, signature, whole, (output, source), partial(_gather, counts))

    def _pair(self, peer: Rank) -> tuple[int, int]:
        if not 0 <= peer < self.size:
            raise ConfigError(f"rank {self.rank}: no rank {peer} in a communicator of {self.size}")
        return self._group.members[self.rank], self._group.members[peer]


# -- what the collectives mean: functions over the arguments of all ranks that came, in rank order ------


def _all_reduce(op: ReduceOp, tensors: dict[Rank, torch.Tensor]) -> None:
    total = reduced(list(tensors.values()), op)
    for t in tensors.values():
        t.copy_(total)


def _reduce(op: ReduceOp, root: Rank, tensors: dict[Rank, torch.Tensor]) -> None:
    _need(root, tensors).copy_(reduced(list(tensors.values()), op))


def _broadcast(root: Rank, tensors: dict[Rank, torch.Tensor]) -> None:
    source = _need(root, tensors)
    for rank, t in tensors.items():
        if rank != root:
            t.copy_(source)


def _gather(counts: list[int], arguments: dict[Rank, Any]) -> None:
    offsets = _offsets(counts)
    for output, _ in arguments.values():
        if output is not None:
            flat = output.view(-1)
            for rank, (_, source) in arguments.items():
                flat[offsets[rank] : offsets[rank] + counts[rank]].copy_(source.reshape(-1))


def _reduce_scatter(op: ReduceOp, counts: list[int], arguments: dict[Rank, Any]) -> None:
    total = reduced([source.reshape(-1) for _, source in arguments.values()], op)
    offsets = _offsets(counts)
    for rank, (output, _) in arguments.items():
        output.view(-1).copy_(total[offsets[rank] : offsets[rank] + counts[rank]])


def _scatter(root: Rank, arguments: dict[Rank, Any]) -> None:
    source = _need(root, arguments)[1].reshape(-1)
    for rank, (output, _) in arguments.items():
        output.view(-1).copy_(source[rank * output.numel() : (rank + 1) * output.numel()])


def _all_to_all(arguments: dict[Rank, Any]) -> None:
    for dst, (output, _, output_counts, _) in arguments.items():
        offsets, flat = _offsets(output_counts), output.view(-1)
        for src, (_, source, _, source_counts) in arguments.items():
            if source_counts[dst] != output_counts[src]:
                raise Mismatch(
                    f"all_to_all: rank {src} gives {source_counts[dst]} elements to rank {dst}, "
                    f"which expects {output_counts[src]}"
                )
            begin = _offsets(source_counts)[dst]
            flat[offsets[src] : offsets[src] + output_counts[src]].copy_(
                source.reshape(-1)[begin : begin + source_counts[dst]]
            )


def _need(root: Rank, arguments: dict[Rank, Any]) -> Any:
    if root not in arguments:
        raise PeerLost(f"the root, rank {root}, is lost: its process ended")
    return arguments[root]


def _offsets(counts: Sequence[int]) -> list[int]:
    return [sum(counts[:i]) for i in range(len(counts))]


def _kind(tensor: torch.Tensor) -> tuple[int, str]:
    return tensor.numel(), str(tensor.dtype)


def _check_counts(
    name: str, counts: Sequence[int], whole: torch.Tensor, part: torch.Tensor, expected: int
) -> None:
    if whole.numel() != sum(counts) or part.numel() != expected:
        raise Mismatch(
            f"{name}: {sum(counts)} and {expected} elements expected, got {whole.numel()} and {part.numel()}"
        )
