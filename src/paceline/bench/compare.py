"""Train one task by several strategies under equal conditions."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from paceline import spec
from paceline.bench import arguments
from paceline.bench.arguments import scripted
from paceline.bench.compute import fastest_threads
from paceline.bench.hardware import describe
from paceline.bench.rows import Comparison, Point, Trial, fastest_seconds
from paceline.bench.training import Report, Setup, train
from paceline.bench.virtual import (
    VirtualCluster,
    costs_of,
    run_virtually,
    with_measured_compute,
)
from paceline.codecs.kernel import ledger
from paceline.comm.simulated.work_costs import WorkCosts
from paceline.errors import CommError, ConfigError, PacelineError, WorkerFailed
from paceline.launchers.launch import launch
from paceline.strategies.base.strategy import class_of, make
from paceline.tasks.load import load
from paceline.tasks.task import Task
from paceline.train.random_state import seed_worker

_POINTS = 10
"""Evaluations per run, about; the half of the epochs is always one of them."""

OnTrial = Callable[[int, int, str, int, "Trial | None"], None]
"""Called with (index, number of strategies, strategy, workers, None before and the result after)."""
OnResult = Callable[[Comparison], None]
"""Called after each strategy with all that is known by then."""


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
    validation: float = 0.0,
    fabric: str | None = None,
    threads: int | None = None,
    progress: bool = True,
    virtual: VirtualCluster | None = None,
    record: str = "",
    replay: str = "",
    on_note: Callable[[str], None] = lambda _: None,
    on_trial: OnTrial = lambda *_: None,
    on_result: OnResult = lambda _: None,
) -> Comparison:
    """Train `task` once per strategy, in the order given, and return what was measured.

    Equal for all: global batch, initial weights, order of the data, epochs, cores in all. The workers
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
        validation: Share of the training set, below 1, that is held out to choose each strategy's best
            evaluation by; default 0: it is chosen on the test set.
        fabric: `"native"` or `"torch"`; default: what `paceline.init` chooses.
        threads: Intra-op threads per worker, where all workers train; default: the cores, divided by the
            workers; 1 on a simulated cluster. `single` has those of all workers; by default as many of them
            as it is fastest with.
        progress: Whether the workers show progress bars.
        virtual: The simulated cluster to train on; None: real processes.
        record: File that keeps the order in which a parameter server handled its messages.
        replay: File with such an order, to be repeated.
        on_note: Called before any training with each warning, and with the compute times that were measured.
        on_trial: Called before and after each strategy.
        on_result: Called after each strategy; a strategy that fails does not lose the others.

    Raises:
        ConfigError: A strategy, the task or a number is wrong; raised before any training.
        WorkerFailed: All runs failed; the message names the first strategy.
    """
    arguments.check_numbers(workers=workers, epochs=epochs, batch_size=batch_size, threads=threads)
    arguments.check_positive(
        learning_rate=learning_rate, seconds_budget=seconds_budget, epochs_budget=epochs_budget
    )
    arguments.check_strategies(strategies, record=record, replay=replay)
    scripts = [scripted(strategy, record=record, replay=replay) for strategy in strategies]
    sizes = _sizes(scripts, workers)
    _check_conditions(virtual, sizes, seed)
    costs = None if virtual is None else costs_of(virtual)
    seed_worker(seed, 0)  # virtual workers copy this model; processes build their own after the same seeding
    built = load(task, data=data)
    epochs, batch_size = epochs or built.epochs, batch_size or built.batch_size
    epochs_budget = _epochs_budget(epochs_budget, epochs)
    held_out = _held_out(validation, built)
    if batch_size < workers:
        raise ConfigError(f"a global batch of {batch_size} samples is too small for {workers} workers")
    chosen, threads = threads, threads or _threads(workers, virtual)
    steps = epochs * math.ceil((len(built.train_set) - held_out) / batch_size)
    if virtual is not None:
        virtual = with_measured_compute(
            virtual, built, batch_size=batch_size, workers=workers, threads=threads, on_note=on_note
        )
    often, budgets = _per_epoch(epochs), (epochs_budget, seconds_budget)
    shared = Setup(task, data, "", epochs, batch_size, learning_rate, seed, often, *budgets, validation)
    runs = []
    for strategy, script, size in zip(strategies, scripts, sizes, strict=True):
        setup = dataclasses.replace(shared, strategy=strategy)
        own_threads = threads if virtual is not None else max(1, threads * workers // size)
        if own_threads > threads and chosen is None:
            own_threads = fastest_threads(built, batch_size, own_threads)
        if warning := make(strategy).fit(steps, size, math.ceil(batch_size / size)):
            on_note(f"warning: {strategy}: {warning}")
        runs.append(_Run(setup, script, size, own_threads, warning))
    comparison = _before_training(shared, built, held_out, virtual, threads=threads, fabric=fabric or "")
    reports_of = partial(_reports, built, workers, virtual, costs, fabric=fabric, progress=progress)
    used_costs = dict if costs is None else costs.used
    return _train_all(comparison, runs, reports_of, used_costs, seconds_budget, on_note, on_trial, on_result)


@dataclass(frozen=True)
class _Run:
    """One strategy's run, before it begins."""

    setup: Setup
    script: str
    """The strategy, with where it records its message order."""
    size: int
    threads: int
    warning: str


def _before_training(
    shared: Setup, built: Task, held_out: int, virtual: VirtualCluster | None, *, threads: int, fabric: str
) -> Comparison:
    """The conditions, without any result."""
    return Comparison(
        task=shared.task,
        trials=(),
        epochs=shared.epochs,
        batch_size=shared.batch_size,
        threads=threads,
        seed=shared.seed,
        train_samples=len(built.train_set) - held_out,
        test_samples=len(built.test_set),
        seconds_budget=shared.seconds_budget or 0.0,
        epochs_budget=shared.epochs_budget,
        fabric="simulated" if virtual is not None else fabric,
        learning_rate=shared.learning_rate,
        validation_samples=held_out,
        simulated=None if virtual is None else dataclasses.asdict(virtual),
        hardware=describe(),
    )


def _train_all(
    comparison: Comparison,
    runs: Sequence[_Run],
    reports_of: Callable[[_Run], list[Report]],
    used_costs: Callable[[], dict[str, dict[str, float]]],
    seconds_budget: float | None,
    on_note: Callable[[str], None],
    on_trial: OnTrial,
    on_result: OnResult,
) -> Comparison:
    """Train by one strategy after the other; what one of them measured is never lost by another's failure."""
    first_error: PacelineError | None = None
    for i, run in enumerate(runs):
        strategy = run.setup.strategy
        on_trial(i, len(runs), strategy, run.size, None)
        try:
            reports = reports_of(run)
        except PacelineError as error:
            first_error = first_error or error
            failures = {**comparison.failures, strategy: str(error)}
            comparison = dataclasses.replace(comparison, failures=failures)
            on_note(f"failed: {error}")
            continue
        trial = _trial(run, reports)
        comparison = dataclasses.replace(_with(comparison, trial, seconds_budget), costs=used_costs())
        on_trial(i, len(runs), strategy, run.size, trial)
        on_result(comparison)
    if not comparison.trials:
        assert first_error is not None
        raise first_error
    return comparison


def _with(comparison: Comparison, trial: Trial, seconds_budget: float | None) -> Comparison:
    """One trial more; without a budget of the user's it is the fastest trial's time."""
    trials = (*comparison.trials, trial)
    budget = fastest_seconds(trials) if seconds_budget is None else seconds_budget
    return dataclasses.replace(comparison, trials=trials, seconds_budget=budget)


def _held_out(validation: float, built: Task) -> int:
    """Samples of the training set that only choose the best evaluation."""
    arguments.check_share(validation)
    if validation and not 0 < round(validation * len(built.train_set)) < len(built.train_set):
        raise ConfigError(
            f"--validation {validation:g} of {len(built.train_set)} samples leaves one of the two sets empty"
        )
    return round(validation * len(built.train_set))


def _threads(workers: int, virtual: VirtualCluster | None) -> int:
    """Intra-op threads of a worker, unless the user says otherwise."""
    return 1 if virtual else max(1, len(os.sched_getaffinity(0)) // workers)


def _sizes(strategies: Sequence[str], workers: int) -> list[int]:
    """Workers for each strategy; every spec is checked."""
    sizes = []
    for text in strategies:
        make(text)
        most = class_of(spec.parse(text).name).max_workers
        sizes.append(workers if most is None else min(workers, most))
    return sizes


def _epochs_budget(wanted: float | None, epochs: int) -> float:
    """What the fourth criterion allows: half of the training, unless the user says otherwise."""
    if wanted is not None and wanted > epochs:
        raise ConfigError(f"--epochs-budget {wanted:g} is more than the {epochs} epochs of training")
    return epochs / 2 if wanted is None else wanted


def _check_conditions(virtual: VirtualCluster | None, sizes: Sequence[int], seed: int) -> None:
    if virtual is not None:
        arguments.check_cluster(
            virtual.compute, virtual.network, virtual.faults, virtual.trace, sizes=sizes, seed=seed
        )


def _per_epoch(epochs: int) -> int:
    """Evaluations per epoch: an even number if the epochs are odd, so that half of them is one."""
    wanted = max(1, round(_POINTS / epochs))
    return wanted + wanted % 2 if epochs % 2 else wanted


def _reports(
    built: Task,
    full_size: int,
    virtual: VirtualCluster | None,
    costs: WorkCosts | None,
    run: _Run,
    *,
    fabric: str | None,
    progress: bool,
) -> list[Report]:
    """Train by one strategy, with its recording; errors name it as the user wrote it."""
    setup = dataclasses.replace(run.setup, strategy=run.script)
    if virtual is not None:
        return run_virtually(setup, built, run.size, full_size, virtual, costs)
    try:
        return launch(
            train,
            num_workers=run.size,
            args=(setup,),
            threads=run.threads,
            fabric=fabric,
            progress=progress,
        )
    except (CommError, WorkerFailed, ConfigError) as error:
        kind: type[PacelineError] = type(error)
        raise kind(f"strategy {run.setup.strategy}: {error}") from error


def _trial(run: _Run, reports: Sequence[Report]) -> Trial:
    points = []
    for readings in zip(*(r.readings for r in reports), strict=True):
        first = readings[0]
        points.append(
            Point(
                epoch=first.epoch,
                seconds=first.seconds,
                samples=first.samples,
                bytes_sent=round(sum(r.scheduled_bytes for r in readings)),
                payload_bytes=sum(r.payload_bytes for r in readings),
                accuracy=first.metrics["accuracy"],
                validation_accuracy=first.validation_accuracy,
                metrics={k: v for k, v in first.metrics.items() if k != "accuracy"},
            )
        )
    return Trial(
        strategy=run.setup.strategy,
        workers=run.size,
        threads=run.threads,
        warning=run.warning,
        curve=tuple(points),
        wait_s=sum(r.wait_s for r in reports) / len(reports),
        advice=class_of(spec.parse(run.setup.strategy).name).advice,
        model_parameters=reports[0].model_parameters,
        parameters_sha256=reports[0].parameters_sha256,
        staleness={k: v for k, v in reports[0].strategy_stats.items() if k != "codec"},
        codec=_ledger(reports),
        work_s=_mean([r.work_s for r in reports]),
        busiest_server_s=max(r.work_s.get("server", 0.0) for r in reports),
    )


def _mean(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each entry, 0 where it is missing."""
    return {k: sum(p.get(k, 0.0) for p in parts) / len(parts) for k in sorted({k for p in parts for k in p})}


def _ledger(reports: Sequence[Report]) -> dict[str, float]:
    """The codecs' ledgers of all workers as one."""
    parts = [r.strategy_stats["codec"] for r in reports if r.strategy_stats.get("codec")]
    return ledger.total(parts) if parts else {}
