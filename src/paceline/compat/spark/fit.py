"""`fit`: a DataFrame and a task in, a trained model and its history out."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from paceline import spec
from paceline.compat.spark import averaging as by_driver
from paceline.compat.spark import rows, worker
from paceline.errors import ConfigError
from paceline.launchers.call import Call
from paceline.launchers.engines.spark import Spark, run_stage
from paceline.launchers.job import JobSpec, Resources
from paceline.launchers.launch import results_of
from paceline.launchers.processes.console import Console
from paceline.launchers.spark.session import use_own_python
from paceline.options import JobOptions
from paceline.strategies.base.strategy import make
from paceline.tasks.load import load
from paceline.tasks.task import Task


class Fitted(NamedTuple):
    """What `fit` returns: `model, history = fit(...)`."""

    model: torch.nn.Module
    """The task's own model, trained."""
    history: list[dict[str, float]]
    """One row per epoch: epoch, seconds, train_loss, and the task's metrics on its test set."""


def fit(
    df: Any,
    task: Task | str,
    *,
    strategy: str = "all_reduce",
    workers: int = 2,
    features: str | Sequence[str] | None = None,
    label: str | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    averaging: str = "collective",
    depth: int = 2,
    data: str | os.PathLike[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    fabric: str | None = None,
    threads: int | None = None,
    max_restarts: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> Fitted:
    """Train `task` on the rows of DataFrame `df` with `workers` tasks in one barrier stage.

    `task`: a `paceline.Task`, or a task's name or file as for `paceline compare` (`data` goes to its
    `build`). Its model, optimizer, loss and metrics are used; its test set, if any, is evaluated after each
    epoch; its train set is replaced by `df`. `features`: one column of numbers, arrays, dense vectors or
    binary, or several columns of numbers; `label`: one column. Rows take the shape and dtype of the task's
    samples. Each worker trains on one partition (`df` is repartitioned when it has another number of them);
    nothing is collected on the driver. `batch_size` counts over all workers.

    `averaging="driver"` is the classic design instead of collectives: `strategy` must be
    `local_sgd(period=…)`; the driver averages parameters by tree aggregation of `depth`, and broadcasts them;
    the arguments after `data` are then refused.
    `checkpoint`: a folder that all executors see; a stage that Spark runs again continues there.
    Raises ConfigError for what cannot be trained, WorkerFailed with the traceback of the worker.
    """
    engine = Spark()
    engine.check_installed()
    if averaging not in ("collective", "driver"):
        raise ConfigError(f"fit: averaging={averaging!r}: 'collective' or 'driver' expected")
    torch.manual_seed(seed)
    built = load(task, data=None if data is None else Path(data)) if isinstance(task, str) else task
    if not isinstance(built, Task):
        raise ConfigError(f"fit: a paceline.Task or a task's name expected, got {type(task).__name__}")
    columns = _columns(df, built, features, label)
    settings = _settings(built, strategy, workers, epochs, batch_size, seed, averaging, depth)
    frame = df.select(*columns.names)
    if frame.rdd.getNumPartitions() != workers:
        frame = frame.repartition(workers)
    if averaging == "driver":
        for name, value in {
            "checkpoint": checkpoint,
            "fabric": fabric,
            "threads": threads,
            "max_restarts": max_restarts,
            "environment": environment,
        }.items():
            if value is not None:
                raise ConfigError(
                    f"fit: {name}= is for workers of their own; with averaging='driver' Spark's tasks train"
                )
        result = by_driver.train(frame, built, columns, settings)
    else:
        own = dataclasses.replace(built, train_set=built.test_set)  # its rows come from the DataFrame
        with Call(worker.train, (own, columns, settings), dumps=engine.dumps) as call:
            job = JobSpec(
                command=call.command,
                call=call,
                num_workers=workers,
                options=JobOptions(
                    fabric=fabric, checkpoint=None if checkpoint is None else os.fspath(checkpoint)
                ),
                threads=threads,
                max_restarts=max_restarts,
                environment=environment or {},
                resources=Resources(),
                name="fit",
            )
            result = results_of(run_stage(job, df.sparkSession, Console(), frame=frame), call)[0]
    built.model.load_state_dict(result["state"])
    return Fitted(built.model, result["history"])


def _columns(df: Any, task: Task, features: Any, label: str | None) -> rows.Columns:
    if not hasattr(df, "mapInArrow") or not hasattr(df, "columns"):
        raise ConfigError(f"fit: a pyspark.sql.DataFrame expected, got {type(df).__name__}")
    use_own_python(df.sparkSession.sparkContext)
    names, target = rows.choose(df.columns, features, label)
    inputs, targets = (torch.as_tensor(value) for value in task.test_set[0])
    return rows.Columns(names, target, tuple(inputs.shape), inputs.dtype, tuple(targets.shape), targets.dtype)


def _settings(
    task: Task,
    strategy: str,
    workers: int,
    epochs: int | None,
    batch_size: int | None,
    seed: int,
    averaging: str,
    depth: int,
) -> dict[str, Any]:
    for name, value in (("workers", workers), ("depth", depth)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"fit: {name}={value!r}: a whole number from 1 up expected")
    chosen = make(strategy)  # a wrong strategy is refused here
    if averaging == "driver" and spec.parse(strategy).name != "local_sgd":
        raise ConfigError(
            f"fit: averaging='driver' averages parameters every few minibatches:"
            f" strategy='local_sgd(period=…)' expected, got {strategy!r}"
        )
    whole = task.batch_size if batch_size is None else batch_size
    if whole < workers:
        raise ConfigError(f"fit: batch_size={whole}: at least one sample per worker ({workers}) expected")
    return {
        "strategy": strategy,
        "epochs": task.epochs if epochs is None else epochs,
        "batch_size": whole // workers,
        "seed": seed,
        "period": getattr(chosen, "period", 1),
        "depth": depth,
    }
