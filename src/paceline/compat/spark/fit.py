"""`fit`: a DataFrame and a task in, a trained model and its history out."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from paceline import spec
from paceline.compat.spark import averaging as by_driver
from paceline.compat.spark import rows, worker
from paceline.errors import ConfigError
from paceline.launchers.engines.spark import SparkRunner
from paceline.launchers.function_call import FunctionCall
from paceline.launchers.job import JobSpec, Resources
from paceline.launchers.launch import results_of
from paceline.launchers.processes.console import Console
from paceline.launchers.spark.driver import run_stage
from paceline.launchers.spark.session import use_own_python
from paceline.options import JobOptions
from paceline.strategies.base.strategy import make
from paceline.tasks.load import load
from paceline.tasks.task import Task

if TYPE_CHECKING:
    from pyspark.sql import DataFrame


class Fitted(NamedTuple):
    """What `fit` returns: `model, history = fit(...)`."""

    model: torch.nn.Module
    """The task's own model, trained."""
    history: list[dict[str, float]]
    """One row per epoch: epoch, seconds, train_loss, and the task's metrics on its test set."""


def fit(
    df: DataFrame,
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
    """Train a task on the rows of a Spark DataFrame, with the workers in one barrier stage.

    Each worker trains on one partition; nothing is collected on the driver. Rows take the shape and dtype of
    the task's samples.

    Args:
        df: The training data; it is repartitioned when it has not one partition per worker.
        task: A `paceline.Task`, or a task's name or file as for `paceline compare`. Its test set, if any, is
            evaluated after each epoch; its training set is replaced by `df`.
        strategy: A strategy string; default all_reduce.
        workers: Number of workers; default 2.
        features: One column of numbers, arrays, dense vectors or binary, or several columns of numbers;
            default: guessed from the columns' names.
        label: One column; default: guessed.
        epochs: Passes over the rows; default: the task's.
        batch_size: Rows per step over all workers; default: the task's.
        seed: Of the initial weights and of the order of the rows; default 0.
        averaging: `"collective"` (default), or `"driver"`: the classic design, in which the driver averages
            parameters by tree aggregation. It needs `strategy="local_sgd(period=…)"` and refuses the
            arguments from `checkpoint` on.
        depth: Of that tree; default 2.
        data: What a task's `build` reads.
        checkpoint: A folder that all executors reach; a stage that Spark runs again continues there.
        fabric: `"native"` or `"torch"`; default: chosen.
        threads: Intra-op threads per worker; default: chosen.
        max_restarts: How often Spark may run the stage again after a failure; default: Spark's setting.
        environment: Further environment variables of the workers.

    Raises:
        ConfigError: What cannot be trained.
        WorkerFailed: With the traceback of the worker.

    Example:
        `model, history = fit(df, "digits", strategy="local_sgd(period=8)", workers=4)`
    """
    runner = SparkRunner()
    runner.check_installed()
    if averaging not in ("collective", "driver"):
        raise ConfigError(f"fit: averaging={averaging!r}: 'collective' or 'driver' expected")
    torch.manual_seed(seed)
    built = load(task, data=None if data is None else Path(data)) if isinstance(task, str) else task
    if not isinstance(built, Task):
        raise ConfigError(f"fit: a paceline.Task or a task's name expected, got {type(task).__name__}")
    columns = _columns(df, built, features, label)
    settings = _settings(built, strategy, workers, epochs, batch_size, seed, averaging, depth)
    frame = _partitioned(df, columns, workers)
    if averaging == "driver":
        _refuse_with_driver(
            checkpoint=checkpoint,
            fabric=fabric,
            threads=threads,
            max_restarts=max_restarts,
            environment=environment,
        )
        result = by_driver.train(frame, built, columns, settings)
    else:
        own = dataclasses.replace(built, train_set=built.test_set)  # its rows come from the DataFrame
        with FunctionCall(worker.train, (own, columns, settings), dumps=runner.dumps) as call:
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


def _refuse_with_driver(**given: object) -> None:
    for name, value in given.items():
        if value is not None:
            raise ConfigError(
                f"fit: {name}= is for workers of their own; with averaging='driver' Spark's tasks train"
            )


def _partitioned(df: DataFrame, columns: rows.Columns, workers: int) -> DataFrame:
    """The chosen columns, one partition per worker."""
    frame = df.select(*columns.names)
    return frame if frame.rdd.getNumPartitions() == workers else frame.repartition(workers)


def _columns(
    df: DataFrame, task: Task, features: str | Sequence[str] | None, label: str | None
) -> rows.Columns:
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
        spec.whole_number(f"fit: {name}", value, least=1)
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
