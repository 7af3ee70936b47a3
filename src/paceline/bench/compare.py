"""Train one task by several strategies under equal conditions."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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
    are new processes each time, or with `virtual` the workers of a simulated cluster; `single` runs in one.
    `record` keeps the order in which a parameter server handled its messages, `replay` repeats it. Raises
    ConfigError before any training if a strategy, the task or a number is wrong, and WorkerFailed naming the
    strategy if a run fails.
    """
    told = [scripted(strategy, record=record, replay=replay) for strategy in strategies]
    sizes = _sizes(told, workers)
    _check_script(strategies, record, replay)
    _check_numbers(workers=workers, epochs=epochs, batch_size=batch_size, threads=threads)
    _check_positive(learning_rate=learning_rate, seconds_budget=seconds_budget, epochs_budget=epochs_budget)
    if virtual is not None:
        check_conditions(virtual, sizes, seed=seed)
    seed_worker(seed, 0)  # virtual workers copy this model; processes build their own after the same seeding
    built = load(task, data=data)
    epochs = epochs or built.epochs
    batch_size = batch_size or built.batch_size
    epochs_budget = epochs / 2 if epochs_budget is None else epochs_budget
    if epochs_budget > epochs:
        raise ConfigError(f"--epochs-budget {epochs_budget:g} is more than the {epochs} epochs of training")
    if batch_size < workers:
        raise ConfigError(f"a global batch of {batch_size} samples is too small for {workers} workers")
    threads = threads or max(1, len(os.sched_getaffinity(0)) // workers)
    trials = []
    for i, (strategy, size) in enumerate(zip(strategies, sizes, strict=True)):
        on_trial(i, len(strategies), strategy, size, None)
        setup = Setup(task, data, strategy, epochs, batch_size, learning_rate, seed, _per_epoch(epochs))
        run = dataclasses.replace(setup, strategy=told[i])
        if virtual is not None:
            trials.append(_trial(setup, size, run_virtually(run, built, size, workers, virtual)))
        else:
            trials.append(_run(setup, run, size, threads=threads, fabric=fabric, progress=progress))
        on_trial(i, len(strategies), strategy, size, trials[-1])
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


def _per_epoch(epochs: int) -> int:
    """Evaluations per epoch: an even number if the epochs are odd, so that half of them is one."""
    wanted = max(1, round(_POINTS / epochs))
    return wanted + wanted % 2 if epochs % 2 else wanted


def _run(setup: Setup, told: Setup, workers: int, **options: Any) -> Trial:
    try:
        reports: list[Report] = launch(train, num_workers=workers, args=(told,), **options)
    except (CommError, WorkerFailed, ConfigError) as error:
        kind: type[PacelineError] = type(error)
        raise kind(f"strategy {setup.strategy}: {error}") from error
    return _trial(setup, workers, reports)


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
