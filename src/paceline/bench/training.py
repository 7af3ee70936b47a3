"""One strategy's training run, as a worker does it, with evaluations off the clock."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paceline.tasks.load import load
from paceline.tasks.task import Task
from paceline.train.joining import init


@dataclass(frozen=True)
class Setup:
    """What every worker of a run is told."""

    task: str
    data: Path | None
    strategy: str
    epochs: int
    batch_size: int
    """Over all workers."""
    learning_rate: float | None
    seed: int
    evaluations_per_epoch: int


@dataclass(frozen=True)
class Reading:
    """One evaluation as one rank saw it; the metrics are those of all ranks."""

    epoch: float
    seconds: float
    samples: int
    payload_bytes: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Report:
    """What a rank brings back."""

    readings: tuple[Reading, ...]
    wait_s: float
    model_parameters: int
    strategy_stats: Mapping[str, Any]
    """What the method measured about itself (staleness, consensus distance, …)."""
    parameters_sha256: str = ""
    """Of worker 0's final parameters; equal for two runs that ended in the same bits."""


def train(setup: Setup, built: Task | None = None) -> Report:
    """Train as `setup` says, in a worker started by `launch`, or in a virtual one that is given the task."""
    from torch.utils.data import DataLoader

    job = init(seed=setup.seed)
    task = load(setup.task, data=setup.data) if built is None else _own(built)
    if setup.learning_rate is not None:
        for group in task.optimizer.param_groups:
            group["lr"] = setup.learning_rate
    loader: Any = DataLoader(task.train_set, batch_size=setup.batch_size, shuffle=True)
    model, optimizer, loader = job.prepare(
        task.model, task.optimizer, loader, strategy=setup.strategy, batch="global"
    )
    stops = evaluation_steps(len(loader), setup.evaluations_per_epoch)
    readings = [_read(job, task, 0.0)]
    for epoch in job.epochs(setup.epochs):
        for step, (inputs, targets) in enumerate(loader, start=1):
            loss: Any = task.loss(model(inputs), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step in stops and (step < len(loader) or epoch + 1 < setup.epochs):
                readings.append(_read(job, task, epoch + step / len(loader)))
    # The last one after `epochs` has drained the strategy: the clock includes it, and the model is final.
    readings.append(_read(job, task, float(setup.epochs)))
    report = Report(
        tuple(readings),
        wait_s=job.stats()["training"]["wait_s"],
        model_parameters=sum(p.numel() for p in task.model.parameters()),
        strategy_stats=job.strategy.stats(),
        parameters_sha256=_digest(task.model) if job.is_main else "",
    )
    job.close()
    return report


def _digest(model: Any) -> str:
    import torch

    digest = hashlib.sha256()
    for parameter in model.parameters():
        data = parameter.detach().cpu().contiguous().reshape(-1)
        digest.update(data.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _own(built: Task) -> Task:
    """The worker's own model and optimizer; the data, which nobody writes, is shared."""
    model, optimizer = copy.deepcopy((built.model, built.optimizer))
    return dataclasses.replace(built, model=model, optimizer=optimizer)


def evaluation_steps(steps: int, evaluations: int) -> set[int]:
    """After which steps of an epoch to evaluate: evenly spread, the last one always."""
    return {max(1, round(steps * i / evaluations)) for i in range(1, evaluations + 1)}


def _read(job: Any, task: Task, epoch: float) -> Reading:
    job.barrier()  # on the clock: training has come this far when the slowest worker has
    stats = job.stats()
    metrics = job.evaluate(task.model, task.test_set, metrics=task.metrics)
    return Reading(
        epoch,
        stats["seconds"],
        stats["samples"],
        stats["training"]["payload_bytes"],
        {k: float(v) for k, v in metrics.items()},
    )
