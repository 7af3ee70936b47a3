"""Comparisons on a simulated cluster: the same training code, in virtual time."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from paceline import spec
from paceline.bench import compute, linear_compute
from paceline.bench.calibration import Calibration
from paceline.bench.training import Report, Setup, train
from paceline.comm.simulated import work_costs
from paceline.comm.simulated.simulate import simulate
from paceline.comm.simulated.work_costs import WorkCosts, once_per_process
from paceline.errors import CommError, ConfigError, PacelineError, RunLengthWarning, WorkerFailed
from paceline.local_work import Rehearsal
from paceline.strategies.server.recording import recorded_threads
from paceline.tasks.task import Task

DEFAULT_NETWORK = "ethernet(gbit=1, message_us=10)"
"""Gigabit Ethernet, and what a message costs both ends beyond its bytes: if that were nothing, the fastest
collective would always be the one in which all send to all at once."""


@dataclass(frozen=True)
class VirtualCluster:
    """What the simulation assumes; see `paceline.simulate`."""

    compute: str = linear_compute.MEASURED
    """Seconds that one of the workers needs for its minibatch; `measured`: as long as on this machine."""
    network: str = DEFAULT_NETWORK
    faults: str = ""
    trace: str = ""
    """Folder for an event log and a Perfetto trace per strategy; empty: none."""
    codec_cost: str = work_costs.MEASURED
    """Virtual time of codecs, servers and outer steps: `measured`: as long as they take on this machine;
    `none`; or a JSON file of an earlier comparison, whose costs are taken again."""


def costs_of(virtual: VirtualCluster) -> WorkCosts | None:
    """What `virtual.codec_cost` names. Raises ConfigError."""
    given = virtual.codec_cost
    if given == work_costs.NONE:
        return None
    if given != work_costs.MEASURED:
        return work_costs.read(given)
    calibration = Calibration()

    def measure(name: str, numel: int, rehearsal: Rehearsal) -> float:
        return calibration.confirmed(f"{name}: {numel}", [once_per_process(name, numel, rehearsal)])[0]

    return WorkCosts(measure=measure)


def with_measured_compute(
    virtual: VirtualCluster,
    built: Task,
    *,
    batch_size: int,
    workers: int,
    threads: int,
    on_note: Callable[[str], None],
) -> VirtualCluster:
    """`virtual` with the task's own compute times instead of `measured`; as it is if it names others."""
    if virtual.compute != linear_compute.MEASURED:
        return virtual
    share = math.ceil(batch_size / workers)
    found = compute.measure(built, few=share, many=batch_size, threads=threads)
    kept = Calibration().confirmed(
        f"minibatch of {_described(built)}: {share} and {batch_size}, threads {threads}",
        [found.step_s, found.sample_s],
        lambda costs: [linear_compute.LinearCompute(*costs).seconds(n) for n in (share, batch_size)],
    )
    found = linear_compute.LinearCompute(*kept)
    few_ms, many_ms = (1000 * found.seconds(samples) for samples in (share, batch_size))
    on_note(
        f"compute times measured on this machine, intra-op threads {threads}: {few_ms:.3g} ms for a worker's "
        f"{share} samples, {many_ms:.3g} ms for all {batch_size}; repeat exactly with --compute '{found}'"
        + (" and --codec-cost FILE, the file of --json" if virtual.codec_cost == work_costs.MEASURED else "")
    )
    return dataclasses.replace(virtual, compute=str(found))


def _described(task: Task) -> str:
    """What decides how long a minibatch takes, in short."""
    shapes = [(name, list(p.shape)) for name, p in task.model.named_parameters()]
    facts = repr((type(task.model).__qualname__, type(task.optimizer).__qualname__, shapes))
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


def run_virtually(
    setup: Setup,
    built: Task,
    workers: int,
    full_size: int,
    virtual: VirtualCluster,
    costs: WorkCosts | None = None,
) -> list[Report]:
    """Train on `workers` virtual workers.

    One that stands for several of `full_size` takes as long as was measured for its larger batches; with
    other compute times, it is so much slower.
    """
    linear = linear_compute.parse(virtual.compute)
    seconds, speeds = virtual.compute, [workers / full_size] * workers
    if linear is not None:
        mean_s = linear.seconds(math.ceil(setup.batch_size / workers))
        seconds, speeds = f"constant(mean_s={mean_s!r})", [1.0] * workers
    name = "".join(c if c.isalnum() else "_" for c in setup.strategy)
    replay = spec.parse(setup.strategy).arguments.get("replay")
    torch.manual_seed(setup.seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RunLengthWarning)  # said before the first strategy
            run = simulate(
                train,
                num_workers=workers,
                args=(setup, built),
                compute=seconds,
                network=virtual.network,
                faults=virtual.faults if workers == full_size else "",
                speeds=speeds,
                seed=setup.seed,
                threads=recorded_threads(replay) if replay else 1,
                log=str(Path(virtual.trace, f"{name}.jsonl")) if virtual.trace else None,
                trace=str(Path(virtual.trace, f"{name}.trace.json")) if virtual.trace else None,
                record=False,
                costs=costs or work_costs.NONE,
            )
    except (CommError, ConfigError) as error:
        kind: type[PacelineError] = type(error)
        raise kind(f"strategy {setup.strategy}: {error}") from error
    except Exception as error:
        raised = f"{type(error).__name__}: {error}"
        raise WorkerFailed(f"strategy {setup.strategy}: a simulated worker raised {raised}") from error
    pairs = zip(run, run.work_s, strict=True)
    return [dataclasses.replace(report, work_s=spent) for report, spent in pairs if report is not None]
