"""The simulated fabric: a deterministic virtual cluster that runs the same code as real processes.

    run = paceline.simulate(train, num_workers=32, compute="pareto(shape=3)", network="ethernet(gbit=1)")
    run[0]              what worker 0 returned
    run.seconds         virtual seconds until the last worker was done
    run.log.digest()    the same for the same seed

Gradients are real, the clock is not: a minibatch takes a drawn time, messages and collectives take the time
that the simulated network needs. One worker runs at a time, so one core is enough and nothing depends on the
timing of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from paceline import local_work
from paceline.comm import current
from paceline.comm.simulated import compute_time, work_costs
from paceline.comm.simulated.clock import VirtualClock
from paceline.comm.simulated.cluster import SimulatedCluster
from paceline.comm.simulated.communicator import SimulatedCommunicator
from paceline.comm.simulated.event_log import EventLog
from paceline.comm.simulated.faults import parse as parse_faults
from paceline.comm.simulated.group import SimulatedGroup
from paceline.comm.simulated.network import SimulatedNetwork
from paceline.comm.simulated.work_costs import WorkCosts
from paceline.errors import ConfigError
from paceline.local_work import Rehearsal, WorkKind
from paceline.schedule import topologies
from paceline.worker_function import takes_rank


@dataclass(frozen=True)
class SimulatedRun(Sequence[Any]):
    """The workers' results in rank order (None for a killed worker), the virtual time and the events."""

    results: list[Any]
    seconds: float
    """Virtual seconds from the start to the end of the last worker."""
    killed: list[int]
    num_events: int
    log: EventLog
    work_s: list[dict[str, float]]
    """Virtual seconds of each rank's local work (see `paceline.local_work`), by kind; empty without costs."""

    # An index or a slice; a result is whatever the user's function returned.
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
    costs: str | WorkCosts = work_costs.NONE,
) -> SimulatedRun:
    """Run `fn(*args)` on virtual workers; inside it, `paceline.init()` joins the virtual cluster.

    Args:
        fn: What each worker runs. If it takes one argument more than `args` has, it gets its rank first, as
            with `paceline.launch`.
        num_workers: Number of workers, at least 1.
        args: Arguments of `fn`.
        compute: Distribution of the seconds of one minibatch; default 10 ms each. See
            `paceline.comm.simulated.compute_time`.
        network: Topology with latencies and bandwidths; see `paceline.schedule.topologies`.
        seed: Seed of compute times, random faults and the workers' random numbers. Runs with the same seed
            are equal, bit for bit.
        faults: What goes wrong and when; default: nothing. See `paceline.comm.simulated.faults`.
        speeds: speeds[r] divides the compute times of worker r; default 1 for all.
        detect_s: Virtual seconds until the others notice a worker's death, in addition to the latency.
        log: File for the event log, as JSON lines.
        trace: File for a Chrome/Perfetto trace.
        record: False keeps no events in memory, for long runs without `log` and `trace`.
        threads: Number of torch's intra-op threads.
        costs: What codecs, servers and outer steps cost: "none" (default), "measured" (as long as on this
            machine, timed once per process; not the same on another day), or
            `paceline.comm.simulated.work_costs.WorkCosts`. Divided by `speeds`, as compute times are.

    Returns:
        The workers' results in rank order, the virtual time and the event log.

    Raises:
        ConfigError: An argument is wrong.
        CommError: No worker can continue; it says which rank waits for what.
        BaseException: What a worker raised.

    Example:
        run = paceline.simulate(train, num_workers=32, network="ethernet(gbit=1)", faults="kill(rank=3,
        at_s=2)")
    """
    if num_workers < 1:
        raise ConfigError(f"num_workers={num_workers}: at least 1 expected")
    if speeds is not None and (len(speeds) != num_workers or min(speeds) <= 0):
        raise ConfigError(f"speeds: {num_workers} numbers above 0 expected, got {list(speeds)}")
    prices = work_costs.make(costs)
    script = parse_faults(faults, num_workers=num_workers, seed=seed)
    clock = VirtualClock(seed)
    events = EventLog(is_recording=record or bool(log or trace))
    cluster = SimulatedCluster(
        clock,
        num_workers=num_workers,
        network=SimulatedNetwork(topologies.parse(network, num_ranks=num_workers), script),
        compute=compute_time.parse(compute),
        speeds=list(speeds or [1.0] * num_workers),
        faults=script,
        log=events,
        seed=seed,
        detect_s=detect_s,
    )
    passes_rank = takes_rank(fn, args, caller="simulate")
    meter = None if prices is None else _Meter(cluster, prices)
    group = SimulatedGroup(cluster, range(num_workers))

    def body(rank: int) -> Any:
        current.provide(SimulatedCommunicator(group, rank))
        local_work.listen(meter)
        try:
            return fn(rank, *args) if passes_rank else fn(*args)
        finally:
            current.provide(None)

    start_s = [script.joins.get(r, 0.0) for r in range(num_workers)]
    local_work.listen(meter)  # this thread, too, runs handlers
    try:
        results = clock.run([partial(body, r) for r in range(num_workers)], start_s, threads=threads)
    finally:
        local_work.listen(None)
        if log:
            events.write(log)
        if trace:
            events.write_trace(trace)
    killed = [w.rank for w in clock.workers if w.is_killed]
    return SimulatedRun(results, clock.now, killed, clock.num_events, events, cluster.work_s)


class _Meter:
    """Charges local work to the rank that does it."""

    def __init__(self, cluster: SimulatedCluster, costs: WorkCosts) -> None:
        self._cluster, self._costs = cluster, costs

    def charge(self, kind: WorkKind, what: str, numel: int, rehearsal: Rehearsal, times: float) -> None:
        seconds = self._costs.seconds(f"{kind.value} {what}", numel, rehearsal)
        self._cluster.work(kind.value, times * seconds)
