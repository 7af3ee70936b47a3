"""Comparisons on a simulated cluster: the same training code, in virtual time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from paceline import spec
from paceline.bench.training import Report, Setup, train
from paceline.comm.simulated import compute_time, faults
from paceline.comm.simulated.simulate import simulate
from paceline.errors import CommError, ConfigError, PacelineError
from paceline.schedule import topologies
from paceline.strategies.server.recording import recorded_threads
from paceline.tasks.task import Task


@dataclass(frozen=True)
class VirtualCluster:
    """What the simulation assumes; see `paceline.simulate`."""

    compute: str = "constant"
    """Seconds that one of the workers needs for its minibatch."""
    network: str = "ethernet(gbit=1)"
    faults: str = ""
    trace: str = ""
    """Folder for an event log and a Perfetto trace per strategy; empty: none."""


def check(virtual: VirtualCluster, sizes: Sequence[int], *, seed: int) -> None:
    """ConfigError for compute times, a network or faults that make no sense, before anybody trains."""
    compute_time.parse(virtual.compute)
    for size in sorted(set(sizes)):
        topologies.parse(virtual.network, num_ranks=size)
    faults.parse(virtual.faults, num_workers=max(sizes), seed=seed)
    if virtual.trace:
        writable_folder(Path(virtual.trace), "--trace")


def writable_folder(folder: Path, option: str) -> None:
    """Make it if need be; ConfigError if that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{option}: folder {folder} cannot be made: {error.strerror}") from None


def run_virtually(
    setup: Setup, built: Task, workers: int, full_size: int, virtual: VirtualCluster
) -> list[Report]:
    """Train on `workers` virtual workers. One that stands for several of `full_size` is so much slower."""
    name = "".join(c if c.isalnum() else "_" for c in setup.strategy)
    replay = spec.parse(setup.strategy).arguments.get("replay")
    torch.manual_seed(setup.seed)
    try:
        run = simulate(
            train,
            num_workers=workers,
            args=(setup, built),
            compute=virtual.compute,
            network=virtual.network,
            faults=virtual.faults if workers == full_size else "",
            speeds=[workers / full_size] * workers,
            seed=setup.seed,
            threads=recorded_threads(replay) if replay else 1,
            log=str(Path(virtual.trace, f"{name}.jsonl")) if virtual.trace else None,
            trace=str(Path(virtual.trace, f"{name}.trace.json")) if virtual.trace else None,
            record=False,
        )
    except (CommError, ConfigError) as error:
        kind: type[PacelineError] = type(error)
        raise kind(f"strategy {setup.strategy}: {error}") from error
    return [report for report in run if report is not None]


def scripted(strategy: str, *, record: str, replay: str) -> str:
    """The spec with where to record its message order, or which recording to repeat."""
    parsed = spec.parse(strategy)
    extra = {k: v for k, v in (("record", record), ("replay", replay)) if v}
    if not extra or parsed.name != "parameter_server":
        return strategy
    return str(spec.Spec(parsed.name, {**parsed.arguments, **extra}))
