"""One strategy's training run, as a worker does it, with evaluations off the clock."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from paceline.errors import RunLengthWarning
from paceline.tasks.load import load
from paceline.tasks.task import Task
from paceline.train.joining import init
from paceline.types import ReduceOp


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
    epochs_budget: float = 0.0
    """There is an evaluation at this many epochs, too."""
    seconds_budget: float | None = None
    """There is an evaluation near this training time, too, if it is known before."""
    validation: float = 0.0
    """Share of the training set that is held out to choose the best evaluation by."""


@dataclass(frozen=True)
class Reading:
    """One evaluation as one rank saw it; the metrics are those of all ranks."""

    epoch: float
    seconds: float
    samples: int
    payload_bytes: int
    scheduled_bytes: float
    metrics: Mapping[str, float]
    validation_accuracy: float | None = None


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
    work_s: Mapping[str, float] = field(default_factory=dict)
    """Virtual seconds of codecs, servers and outer steps on this rank, by kind."""


def train(setup: Setup, built: Task | None = None) -> Report:
    """Train as `setup` says, in a worker started by `launch`, or in a virtual one that is given the task."""
    from torch.utils.data import DataLoader

    if built is None:  # a process of its own
        warnings.simplefilter("ignore", RunLengthWarning)  # said before the workers started
    job = init(seed=setup.seed)
    task = load(setup.task, data=setup.data) if built is None else _own(built)
    if setup.learning_rate is not None:
        for group in task.optimizer.param_groups:
            group["lr"] = setup.learning_rate
    train_set, held_out = split(task.train_set, setup.validation)
    loader: Any = DataLoader(train_set, batch_size=setup.batch_size, shuffle=True)
    model, optimizer, loader = job.prepare(
        task.model, task.optimizer, loader, strategy=setup.strategy, batch="global"
    )
    stops = EvaluationStops(len(loader), setup)
    read = partial(_read, job, task, held_out)
    readings = [read(0.0)]
    for epoch in job.epochs(setup.epochs):
        for step, (inputs, targets) in enumerate(loader, start=epoch * len(loader) + 1):
            loss: Any = task.loss(model(inputs), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if stops.is_next(step):
                readings.append(read(step / len(loader)))
                stops.plan(step, readings[-1].seconds)
    # The last one after `epochs` has drained the strategy: the clock includes it, and the model is final.
    readings.append(read(float(setup.epochs)))
    report = Report(
        tuple(readings),
        wait_s=job.stats()["training"]["wait_s"],
        model_parameters=sum(p.numel() for p in task.model.parameters()),
        strategy_stats=job.strategy.stats(),
        parameters_sha256=_digest(task.model) if job.is_main else "",
    )
    job.close()
    return report


def split(train_set: Any, validation: float) -> tuple[Any, Any]:
    """The training set without a share of it, and that share; None if the share is 0. Always the same."""
    from torch.utils.data import Subset

    held_out = round(validation * len(train_set))
    if not held_out:
        return train_set, None
    order = torch.randperm(len(train_set), generator=torch.Generator().manual_seed(0)).tolist()
    return Subset(train_set, order[held_out:]), Subset(train_set, order[:held_out])


class EvaluationStops:
    """After which steps to evaluate: evenly spread, at the epoch budget, and near the time budget.

    Args:
        steps_per_epoch: Steps of one epoch, at least 1.
        setup: The run.
    """

    def __init__(self, steps_per_epoch: int, setup: Setup) -> None:
        self._last = steps_per_epoch * setup.epochs
        within = evaluation_steps(steps_per_epoch, setup.evaluations_per_epoch)
        self._stops = {epoch * steps_per_epoch + step for epoch in range(setup.epochs) for step in within}
        self._stops.add(round(setup.epochs_budget * steps_per_epoch))
        self._budget_s = setup.seconds_budget

    def is_next(self, step: int) -> bool:
        """Whether to evaluate after `step`, counted from 1; the last evaluation comes after the last step."""
        return step in self._stops and step < self._last

    def plan(self, step: int, seconds: float) -> None:
        """Add the step at which the time budget will be used up, at the pace so far.

        Args:
            step: The step after which an evaluation has been made.
            seconds: Training time then, the same on all ranks.
        """
        if self._budget_s is not None and 0 < seconds < self._budget_s:
            self._stops.add(max(step + 1, round(step * self._budget_s / seconds)))


def _digest(model: Any) -> str:
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


def _read(job: Any, task: Task, held_out: Any, epoch: float) -> Reading:
    """Evaluate; the waiting for it is off the clock, and the time is that of the slowest worker.

    Nobody would wait for the others here, were it not for the evaluation: on the clock, that would take from
    methods without barriers what they are for.
    """
    stats = job.stats()
    with job.clock.paused():
        job.barrier()
        slowest = torch.tensor([stats["seconds"]], dtype=torch.float64)
        job.comm.all_reduce(slowest, op=ReduceOp.MAX).wait()
    metrics = job.evaluate(task.model, task.test_set, metrics=task.metrics)
    chosen = None
    if held_out is not None:
        accuracy = {"accuracy": task.metrics["accuracy"]}
        chosen = float(job.evaluate(task.model, held_out, metrics=accuracy)["accuracy"])
    return Reading(
        epoch,
        float(slowest),
        stats["samples"],
        stats["training"]["payload_bytes"],
        stats["training"]["scheduled_bytes"],
        {k: float(v) for k, v in metrics.items()},
        chosen,
    )
