"""Parameter averaging by the driver: the classic design, to compare with.

Each round: the driver broadcasts the parameters, every task trains `period` minibatches on its partition
from them, and the results come back through Spark's tree aggregation of configurable depth. Tasks keep
nothing between rounds, so the optimizer's state is averaged and broadcast with the parameters, as with
`local_sgd(average_optimizer=true)`. A task that is lost is run again by Spark from its round's broadcast.

Source: Zinkevich et al., NIPS 2010; Moritz et al. (SparkNet), ICLR 2016.
"""

from __future__ import annotations

import copy
import io
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from paceline.compat.spark.rows import Columns, tensors
from paceline.compat.spark.worker import NO_ROWS, EpochOrder
from paceline.errors import ConfigError, WorkerFailed
from paceline.launchers.spark.session import explain
from paceline.tasks.task import Task
from paceline.train.modules.flat_tensors import unflatten

if TYPE_CHECKING:
    from pyspark.broadcast import Broadcast
    from pyspark.sql import DataFrame

Sums = tuple[Any, Any, float, float, float]
"""Σ weight · state [numel] float64, counters [n] (largest), Σ weight, Σ loss, minibatches."""

_kept: dict[tuple[str, int], tuple[Any, Any]] = {}  # a Python worker of Spark is used again for later rounds


def train(frame: DataFrame, task: Task, columns: Columns, settings: dict[str, Any]) -> dict[str, Any]:
    """Train by rounds; returns the model's state and the history, as the collective design does.

    Raises WorkerFailed with what a task raised.
    """
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException

    try:
        return _train(frame, task, columns, settings)
    except (PySparkException, Py4JError) as error:
        raise WorkerFailed(f"fit, averaging by the driver: {explain(error)}") from error


def _train(frame: DataFrame, task: Task, columns: Columns, settings: dict[str, Any]) -> dict[str, Any]:
    from pyspark import StorageLevel

    context = frame.sparkSession.sparkContext
    rows = frame.mapInArrow(_pack, "rows binary").rdd.map(lambda row: bytes(row[0]))
    rows = rows.persist(StorageLevel.MEMORY_AND_DISK)
    blank = copy.deepcopy(task)
    blank.test_set = blank.train_set = None
    job_name = f"{time.time_ns()}"
    setup = context.broadcast(_dumps((blank, columns, settings)))
    state = _State(task.model, task.optimizer)
    history: list[dict[str, float]] = []
    try:
        counts = rows.mapPartitions(_count).collect()
        steps = max(-(-count // settings["batch_size"]) for count in counts)
        last = steps * settings["epochs"]
        seconds, loss, batches, start = 0.0, 0.0, 0.0, time.perf_counter()
        for first in range(0, last, settings["period"]):
            end = min(first + settings["period"], last)
            shared = context.broadcast(state.content())
            work = _Round(job_name, setup, shared, first, end, steps)
            sums = rows.mapPartitionsWithIndex(work).treeReduce(_add, settings["depth"])
            shared.unpersist()
            state.load(sums)
            loss, batches = loss + sums[3], batches + sums[4]
            if end // steps > first // steps:
                seconds += time.perf_counter() - start
                row = {"epoch": float(end // steps), "seconds": seconds, "train_loss": loss / batches}
                history.append(row | evaluate(task))
                loss, batches, start = 0.0, 0.0, time.perf_counter()
    finally:
        rows.unpersist()
        setup.unpersist()
    return {"history": history, "state": task.model.state_dict(), "stats": {}}


def evaluate(task: Task) -> dict[str, float]:
    """The task's metrics (sum, count) on its test set, on the driver."""
    if task.test_set is None:
        return {}
    was_training = task.model.training
    task.model.eval()
    sums: dict[str, Any] = {}
    with torch.no_grad():
        for inputs, targets in torch.utils.data.DataLoader(task.test_set, batch_size=512):
            outputs = task.model(inputs)
            for name, metric in task.metrics.items():
                total, count = metric(outputs, targets)
                before = sums.get(name, (0.0, 0))
                sums[name] = (before[0] + float(total), before[1] + count)
    task.model.train(was_training)
    return {name: total / count for name, (total, count) in sums.items()}


class _State:
    """Parameters, floating buffers and optimizer state as one float64 vector, and the counters."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model, self._optimizer = model, optimizer

    def content(self) -> bytes:
        return _dumps((self._model.state_dict(), self._optimizer.state_dict()))

    def restore(self, content: bytes) -> None:
        """Take over a broadcast."""
        model, optimizer = torch.load(io.BytesIO(content), weights_only=True)
        self._model.load_state_dict(model)
        self._optimizer.load_state_dict(optimizer)

    def read(self, weight: float, loss: float, batches: float) -> Sums:
        """What this worker adds to the sums of a round."""
        vector, counters = self._split()
        flat = [t.detach().double().reshape(-1).numpy() for t in vector]
        return np.concatenate(flat) * weight, np.array([float(c) for c in counters]), weight, loss, batches

    def load(self, sums: Sums) -> None:
        """Take over the average."""
        self.make_optimizer_state()
        vector, counters = self._split()
        mean = torch.from_numpy(sums[0] / sums[2])
        unflatten(mean, vector)
        with torch.no_grad():
            for value, tensor in zip(sums[1], counters, strict=True):
                tensor.fill_(value)

    def _split(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        tensors = [*self._model.state_dict().values()]
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                state = self._optimizer.state.get(parameter, {})
                tensors += [v for _, v in sorted(state.items()) if isinstance(v, torch.Tensor)]
        return (
            [t for t in tensors if t.is_floating_point() and t.ndim],
            [t for t in tensors if not (t.is_floating_point() and t.ndim)],
        )

    def make_optimizer_state(self) -> None:
        """Optimizers make their state in their first step; the driver takes one that changes nothing."""
        if self._optimizer.state:
            return
        before = [p.detach().clone() for p in self._model.parameters()]
        for parameter in self._model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self._optimizer.step()
        self._optimizer.zero_grad()
        with torch.no_grad():
            for parameter, value in zip(self._model.parameters(), before, strict=True):
                parameter.copy_(value)


class _Round:
    """One round on one partition; a task of Spark."""

    def __init__(
        self, job: str, setup: Broadcast, shared: Broadcast, first: int, end: int, steps: int
    ) -> None:
        self._job, self._setup, self._shared = job, setup, shared
        self._first, self._end, self._steps = first, end, steps

    def __call__(self, index: int, rows: Iterator[bytes]) -> Iterator[Sums]:
        if (self._job, index) not in _kept:
            _kept.clear()
            torch.set_num_threads(1)
            setup = _loads(self._setup.value)
            _kept[self._job, index] = (setup, tensors(_table(rows), setup[1]))
        for _ in rows:  # Spark ends a Python worker that leaves rows unread; a new one must import torch
            pass
        (task, _, settings), (x, y) = _kept[self._job, index]
        state = _State(task.model, task.optimizer)
        state.restore(self._shared.value)
        order = EpochOrder(len(x), settings["batch_size"], seed=settings["seed"], worker=index)
        task.model.train()
        loss_sum, done = 0.0, 0
        for epoch, batch in self._batches(order):
            if done == 0:
                torch.manual_seed(settings["seed"] + 1009 * epoch + index)
            task.optimizer.zero_grad()
            loss = task.loss(task.model(x[batch]), y[batch])
            loss.backward()
            task.optimizer.step()
            loss_sum, done = loss_sum + float(loss.detach()), done + 1
        if not task.optimizer.state:
            state.make_optimizer_state()
        yield state.read(done / (self._end - self._first), loss_sum, float(done))

    def _batches(self, order: EpochOrder) -> Iterator[tuple[int, list[int]]]:
        for epoch in range(self._first // self._steps, (self._end - 1) // self._steps + 1):
            order.epoch = epoch
            for step, batch in enumerate(order, start=epoch * self._steps):
                if self._first <= step < self._end:
                    yield epoch, batch


def _add(a: Sums, b: Sums) -> Sums:
    return a[0] + b[0], np.maximum(a[1], b[1]), a[2] + b[2], a[3] + b[3], a[4] + b[4]


def _pack(batches: Iterator[Any]) -> Iterator[Any]:
    """Arrow batches as rows of bytes, so that they can be kept in Spark's memory."""
    import pyarrow as pa

    for batch in batches:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        yield pa.RecordBatch.from_arrays([pa.array([sink.getvalue().to_pybytes()], pa.binary())], ["rows"])


def _table(rows: Iterator[bytes]) -> Any:
    import pyarrow as pa

    tables = [pa.ipc.open_stream(content).read_all() for content in rows]
    if not tables:
        raise ConfigError(NO_ROWS)
    return pa.concat_tables(tables)


def _count(rows: Iterator[bytes]) -> Iterator[int]:
    yield _table(rows).num_rows


def _dumps(value: tuple[object, ...]) -> bytes:
    from pyspark import cloudpickle

    if not isinstance(value[0], dict):
        content: bytes = cloudpickle.dumps(value)
        return content
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _loads(content: bytes) -> Any:
    from pyspark import cloudpickle

    return cloudpickle.loads(content)
