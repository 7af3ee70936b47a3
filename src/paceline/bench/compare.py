"""Train one task by several strategies under equal conditions."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from paceline import spec
from paceline.bench.hardware import describe
from paceline.bench.rows import Comparison, Point, Trial, fastest_seconds
from paceline.bench.training import Report, Setup, train
from paceline.bench.virtual import VirtualCluster, run_virtually, scripted, writable_folder
from paceline.bench.virtual import check as check_conditions
from paceline.codecs.kernel import ledger
from paceline.errors import CommError, ConfigError, PacelineError, WorkerFailed
from paceline.launchers.launch import launch
from paceline.strategies.base.strategy import class_of, make
from paceline.tasks.load import load
from paceline.tasks.task import Task
from paceline.train.random_state import seed_worker

_POINTS = 10
"""Evaluations per run, about; the half of the epochs is always one of them."""
_MAX_WORKERS = 1024

OnTrial = Callable[[int, int, str, int, "Trial | None"], None]
"""Called with (index, number of strategies, strategy, workers, None before and the result after)."""


def compare(
    task: str,
    *,
    strategies: Sequence[str],
    workers: int = 2,
    data: Path | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    seed: int = 0,
    seconds_budget: float | None = None,
    epochs_budget: float | None = None,
    fabric: str | None = None,
    threads: int | None = None,
    progress: bool = True,
    virtual: VirtualCluster | None = None,
    record: str = "",
    replay: str = "",
    on_trial: OnTrial = lambda *_: None,
) -> Comparison:
    """Train `task` once per strategy, in the order given, and return what was measured.

    Equal for all: global batch, initial weights, order of the data, epochs, threads per worker. The workers
    are new processes for every strategy, or with `virtual` the workers of a simulated cluster.

    Args:
        task: Name of a built-in task, or the path of a file that defines `build() -> Task`.
        strategies: Strategy strings, e.g. `["single", "local_sgd(period=8)"]`; `single` runs in one process.
        workers: Workers of every strategy that allows several; default 2.
        data: File or folder for a task that reads one.
        epochs: Passes over the training set; default: the task's.
        batch_size: Samples per step over all workers; default: the task's.
        learning_rate: Replaces the task's in every parameter group.
        seed: Of initial weights and data order; default 0.
        seconds_budget: Training time of the third criterion, in seconds; default: the fastest strategy's.
        epochs_budget: Passes of the fourth criterion; default: half of `epochs`.
        fabric: `"native"` or `"torch"`; default: what `paceline.init` chooses.
        threads: Intra-op threads per worker; default: the cores, divided by the workers.
        progress: Whether the workers show progress bars.
        virtual: The simulated cluster to train on; None: real processes.
        record: File that keeps the order in which a parameter server handled its messages.
        replay: File with such an order, to be repeated.
        on_trial: Called before and after each strategy.

    Raises:
        ConfigError: A strategy, the task or a number is wrong; raised before any training.
        WorkerFailed: A run failed; the message names the strategy.
    """
    scripts = [scripted(strategy, record=record, replay=replay) for strategy in strategies]
    sizes = _sizes(scripts, workers)
    _check_script(strategies, record, replay)
    _check_numbers(workers=workers, epochs=epochs, batch_size=batch_size, threads=threads)
    _check_positive(learning_rate=learning_rate, seconds_budget=seconds_budget, epochs_budget=epochs_budget)
    _check_conditions(virtual, sizes, seed)
    seed_worker(seed, 0)  # virtual workers copy this model; processes build their own after the same seeding
    built = load(task, data=data)
    epochs = epochs or built.epochs
    batch_size = batch_size or built.batch_size
    epochs_budget = _epochs_budget(epochs_budget, epochs)
    if batch_size < workers:
        raise ConfigError(f"a global batch of {batch_size} samples is too small for {workers} workers")
    threads = threads or max(1, len(os.sched_getaffinity(0)) // workers)
    shared = Setup(task, data, "", epochs, batch_size, learning_rate, seed, _per_epoch(epochs))
    setups = [dataclasses.replace(shared, strategy=strategy) for strategy in strategies]
    reports_of = partial(_reports, built, workers, virtual, threads=threads, fabric=fabric, progress=progress)
    trials = []
    for i, (setup, script, size) in enumerate(zip(setups, scripts, sizes, strict=True)):
        on_trial(i, len(setups), setup.strategy, size, None)
        trials.append(_trial(setup, size, reports_of(setup, script, size)))
        on_trial(i, len(setups), setup.strategy, size, trials[-1])
    return Comparison(
        task=task,
        trials=tuple(trials),
        epochs=epochs,
        batch_size=batch_size,
        threads=threads,
        seed=seed,
        train_samples=len(built.train_set),
        test_samples=len(built.test_set),
        seconds_budget=fastest_seconds(trials) if seconds_budget is None else seconds_budget,
        epochs_budget=epochs_budget,
        fabric="simulated" if virtual is not None else fabric or "",
        simulated=None if virtual is None else dataclasses.asdict(virtual),
        learning_rate=learning_rate,
        hardware=describe(),
    )


def _sizes(strategies: Sequence[str], workers: int) -> list[int]:
    """Workers for each strategy; every spec is checked."""
    if not strategies:
        raise ConfigError("--strategies: at least one expected, e.g. single,all_reduce")
    sizes = []
    for text in strategies:
        make(text)
        most = class_of(spec.parse(text).name).max_workers
        sizes.append(workers if most is None else min(workers, most))
    return sizes


def _check_script(strategies: Sequence[str], record: str, replay: str) -> None:
    """Recording and replaying are for one parameter_server at a time, and files that can be written."""
    if not (record or replay):
        return
    option = "--record" if record else "--replay"
    servers = [s for s in strategies if spec.parse(s).name == "parameter_server"]
    if len(servers) != 1:
        raise ConfigError(
            f"{option} is for one parameter_server among the strategies, got {len(servers)}: "
            "a recording holds the message order of one run"
        )
    if record:
        writable_folder(Path(record).parent, "--record")


def _check_numbers(**values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')}: at least 1 expected, got {value}")
    if (values["workers"] or 1) > _MAX_WORKERS:
        raise ConfigError(f"--workers: at most {_MAX_WORKERS} expected, got {values['workers']}")


def _check_positive(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"--{name.replace('_', '-')}: a number above 0 expected, got {value:g}")


def _epochs_budget(wanted: float | None, epochs: int) -> float:
    """What the fourth criterion allows: half of the training, unless the user says otherwise."""
    if wanted is not None and wanted > epochs:
        raise ConfigError(f"--epochs-budget {wanted:g} is more than the {epochs} epochs of training")
    return epochs / 2 if wanted is None else wanted


def _check_conditions(virtual: VirtualCluster | None, sizes: Sequence[int], seed: int) -> None:
    if virtual is not None:
        check_conditions(virtual, sizes, seed=seed)


def _per_epoch(epochs: int) -> int:
    """Evaluations per epoch: an even number if the epochs are odd, so that half of them is one."""
    wanted = max(1, round(_POINTS / epochs))
    return wanted + wanted % 2 if epochs % 2 else wanted


def _reports(
    built: Task,
    full_size: int,
    virtual: VirtualCluster | None,
    setup: Setup,
    script: str,
    workers: int,
    *,
    threads: int,
    fabric: str | None,
    progress: bool,
) -> list[Report]:
    """Train by one strategy, `script` with its recording; errors name it as the user wrote it."""
    run = dataclasses.replace(setup, strategy=script)
    if virtual is not None:
        return run_virtually(run, built, workers, full_size, virtual)
    try:
        return launch(
            train, num_workers=workers, args=(run,), threads=threads, fabric=fabric, progress=progress
        )
    except (CommError, WorkerFailed, ConfigError) as error:
        kind: type[PacelineError] = type(error)
        raise kind(f"strategy {setup.strategy}: {error}") from error


def _trial(setup: Setup, workers: int, reports: Sequence[Report]) -> Trial:
    points = []
    for readings in zip(*(r.readings for r in reports), strict=True):
        first = readings[0]
        points.append(
            Point(
                epoch=first.epoch,
                seconds=first.seconds,
                samples=first.samples,
                bytes_sent=sum(r.payload_bytes for r in readings),
                accuracy=first.metrics["accuracy"],
                metrics={k: v for k, v in first.metrics.items() if k != "accuracy"},
            )
        )
    return Trial(
        strategy=setup.strategy,
        workers=workers,
        curve=tuple(points),
        wait_s=sum(r.wait_s for r in reports) / len(reports),
        advice=class_of(spec.parse(setup.strategy).name).advice,
        model_parameters=reports[0].model_parameters,
        parameters_sha256=reports[0].parameters_sha256,
        staleness={k: v for k, v in reports[0].strategy_stats.items() if k != "codec"},
        codec=_ledger(reports),
    )


def _ledger(reports: Sequence[Report]) -> dict[str, float]:
    """The codecs' ledgers of all workers as one."""
    parts = [r.strategy_stats["codec"] for r in reports if r.strategy_stats.get("codec")]
    return ledger.total(parts) if parts else {}
