"""The simulated fabric: a deterministic virtual cluster that runs the same code as real processes.

    run = paceline.simulate(train, num_workers=32, compute="pareto(shape=3)", network="ethernet(gbit=1)")
    run[0]              what worker 0 returned
    run.seconds         virtual seconds until the last worker was done
    run.log.digest()    the same for the same seed

Gradients are real, the clock is not: a minibatch takes a drawn time, messages and collectives take what the
network makes of them. One worker runs at a time, so one core is enough and nothing depends on thread timing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

from paceline.comm import current
from paceline.comm.simulated import compute_time
from paceline.comm.simulated.clock import World
from paceline.comm.simulated.cluster import VirtualCluster
from paceline.comm.simulated.communicator import SimulatedCommunicator
from paceline.comm.simulated.event_log import EventLog
from paceline.comm.simulated.faults import parse as parse_faults
from paceline.comm.simulated.group import SimulatedGroup
from paceline.comm.simulated.network import Network
from paceline.errors import ConfigError
from paceline.schedule import topologies


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
    threads: int = 1,
) -> SimulatedRun:
    """Run `fn(*args)` on `num_workers` virtual workers; inside, `paceline.init()` joins the virtual cluster.

    As with `paceline.launch`, a function that takes one argument more gets its rank first.

    `compute`: seconds per minibatch, a distribution (see `paceline.comm.simulated.compute_time`);
    `speeds[r]` divides them for worker r. `network`: see `paceline.schedule.topologies`. `faults`: see
    `paceline.comm.simulated.faults`; a death is noticed `detect_s` later. `log`, `trace`: files for the event
    log (JSON lines) and the Chrome/Perfetto trace; `record=False` keeps no events; `threads`: torch's
    intra-op threads. Raises what a worker raised, or CommError with who waits for whom when nobody can go on.
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
        network=Network(topologies.parse(network, num_ranks=num_workers), script),
        compute=compute_time.parse(compute),
        speeds=list(speeds or [1.0] * num_workers),
        faults=script,
        log=events,
        seed=seed,
        detect_s=detect_s,
    )
    passes_rank = _passes_rank(fn, args)
    group = SimulatedGroup(cluster, range(num_workers))

    def body(rank: int) -> Any:
        current.provide(SimulatedCommunicator(group, rank))
        try:
            return fn(rank, *args) if passes_rank else fn(*args)
        finally:
            current.provide(None)

    start_s = [script.joins.get(r, 0.0) for r in range(num_workers)]
    try:
        results = world.run([partial(body, r) for r in range(num_workers)], start_s, threads=threads)
    finally:
        if log:
            events.write(log)
        if trace:
            events.write_trace(trace)
    killed = [w.rank for w in world.workers if w.is_killed]
    return SimulatedRun(results, world.now, killed, world.num_events, events)


def _passes_rank(fn: Callable[..., Any], args: Sequence[Any]) -> bool:
    try:
        takes = signature(fn)
    except (ValueError, TypeError):
        return False
    for given, passes_rank in ((tuple(args), False), ((0, *args), True)):
        try:
            takes.bind(*given)
        except TypeError:
            continue
        return passes_rank
    raise ConfigError(f"simulate: the function takes {takes}, which does not fit {len(args)} arguments")
