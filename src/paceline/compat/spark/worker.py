"""What each worker of `fit` runs: its own partition, again and again, in an order drawn from the seed."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, TensorDataset

from paceline.compat.spark.rows import Columns, tensors
from paceline.errors import ConfigError
from paceline.launchers.function_call import keep_progress, progress
from paceline.launchers.spark.tasks import PARTITION
from paceline.tasks.task import Task
from paceline.train.job import Job

NO_ROWS = (
    "fit: a worker got no rows: fewer partitions of the DataFrame have rows than there are workers;"
    " repartition it, or ask for fewer workers"
)


class EpochOrder(BatchSampler):
    """A partition's minibatches in `epoch`: a permutation drawn from (seed, worker, epoch)."""

    def __init__(self, count: int, batch_size: int, *, seed: int, worker: int) -> None:
        self._count, self._batch_size = count, batch_size
        self._stream = (seed, worker)
        self.epoch = 0

    def __len__(self) -> int:
        return math.ceil(self._count / self._batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        seed, worker = self._stream
        generator = torch.Generator().manual_seed((seed * 1_000_003 + self.epoch) * 65_537 + worker)
        order = torch.randperm(self._count, generator=generator)
        return iter(part.tolist() for part in torch.split(order, self._batch_size))


def read_partition(path: str | Path, columns: Columns) -> tuple[Tensor, Tensor]:
    """The rows that Spark gave to this worker."""
    import pyarrow as pa

    if os.path.getsize(path) == 0:
        raise ConfigError(NO_ROWS)
    with pa.memory_map(str(path)) as source:
        return tensors(pa.ipc.open_file(source).read_all(), columns)


def train(task: Task, columns: Columns, settings: dict[str, Any]) -> dict[str, Any]:
    """Train `task` on this worker's partition; rank 0 returns the model's state and the history."""
    import paceline

    job = paceline.init(seed=settings["seed"])
    x, y = read_partition(os.environ[PARTITION], columns)
    order = EpochOrder(len(x), settings["batch_size"], seed=settings["seed"], worker=job.rank)
    loader: DataLoader[tuple[Tensor, ...]] = DataLoader(TensorDataset(x, y), batch_sampler=order)
    saved: dict[str, Any] = {"history": []}
    if job.checkpoint is None:
        _continue(job, task, saved)
    model, optimizer, loader = job.prepare(
        task.model, task.optimizer, loader, strategy=settings["strategy"], shard=False
    )
    job.register(history=_Plain(saved))
    for epoch in job.epochs(settings["epochs"]):
        order.epoch = epoch
        total = count = 0.0
        for inputs, targets in loader:
            loss: Tensor = task.loss(model(inputs), targets)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            total, count = total + float(loss.detach()), count + 1
        row = {"epoch": epoch + 1, "seconds": job.clock.seconds}
        row |= job.all_reduce_metrics({"train_loss": (total, count)})
        if task.test_set is not None:
            row |= job.evaluate(model, task.test_set, metrics=task.metrics)
        saved["history"].append({k: float(v) for k, v in row.items()})
        if job.checkpoint is not None:
            job.save(job.checkpoint)
        else:
            _keep(job, task, saved, epoch + 1)
    if task.test_set is not None and saved["history"]:  # the model that is returned: replicas are one now
        final = job.evaluate(model, task.test_set, metrics=task.metrics)
        saved["history"][-1] |= {k: float(v) for k, v in final.items()}
    result = {"history": saved["history"], "stats": job.stats()}
    if job.is_main:
        result["state"] = {k: v.detach().clone() for k, v in task.model.state_dict().items()}
    job.close()
    return result


def _keep(job: Job, task: Task, saved: dict[str, Any], next_epoch: int) -> None:
    """Without a checkpoint: rank 0 leaves the averaged model with the launcher, for a stage run again."""
    attachment = job.attachments[-1]
    consensus = attachment.strategy.consensus()  # all ranks take part
    if not job.is_main:
        return
    flats = list(attachment.replica.parameters)
    own = [flat.clone() for flat in flats]
    with torch.no_grad():
        torch._foreach_copy_(flats, consensus if consensus is not None else own)
        model = {k: v.detach().clone() for k, v in task.model.state_dict().items()}
        torch._foreach_copy_(flats, own)
    content = io.BytesIO()
    values = {"model": model, "optimizer": task.optimizer.state_dict(), "history": saved["history"]}
    torch.save({**values, "next_epoch": next_epoch, "seconds": job.clock.seconds}, content)
    keep_progress(content.getvalue())


def _continue(job: Job, task: Task, saved: dict[str, Any]) -> None:
    """Begin where the attempt before was after its last whole epoch; before `prepare`, which spreads it."""
    content = progress()
    if content is None:
        return
    values = torch.load(io.BytesIO(content), weights_only=True)
    task.model.load_state_dict(values["model"])
    task.optimizer.load_state_dict(values["optimizer"])
    saved["history"] = values["history"]
    job.set_resumed(values["next_epoch"], values["seconds"])


class _Plain:
    """The history as part of checkpoints."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    def state_dict(self) -> dict[str, Any]:
        return dict(self._values)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._values.update(state)
