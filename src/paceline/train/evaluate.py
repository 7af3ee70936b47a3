"""Exact distributed evaluation: sums and counts travel, never means; no sample is padded or seen twice.

The strategy's consensus model is evaluated, and training goes on as if nothing had happened: parameters,
buffers, train/eval modes and random states are put back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler, Subset

from paceline.errors import ConfigError
from paceline.train import plain, preparation, random_state
from paceline.train.attachment import Attachment
from paceline.train.data.loader import ShardedLoader
from paceline.train.data.sharding import share
from paceline.types import Batch, Communicator

Outputs: TypeAlias = Any
"""What the model or the data gives, of whatever kind the metrics take."""
Forward = Callable[[nn.Module, Batch], tuple[Any, Any]]
"""(model, batch) → (outputs, targets), of whatever kind the metrics take."""
Metric = Callable[[Any, Any], tuple[Any, Any]]
"""(outputs, targets) → (sum, count), numbers or one-element tensors."""
Data = Dataset[Any] | DataLoader[Any] | ShardedLoader
_DEFAULT_BATCH = 256


def evaluate(
    model: nn.Module,
    data: Data,
    metrics: Mapping[str, Any],
    comm: Communicator,
    attachments: Sequence[Attachment],
    *,
    batch_size: int | None = None,
    forward: Forward | None = None,
) -> dict[str, Any]:
    """The metrics of `model` over all of `data`, equal on every rank; see `Job.evaluate`."""
    callables, objects = _sort_metrics(metrics)
    with _undisturbed(model), torch.no_grad():
        batches = _batches(data, comm, batch_size)
        for attachment in attachments:
            attachment.finish_minibatch()
        with consensus(attachments, comm):
            model.eval()
            totals = torch.zeros(len(callables) * 2 + 1, dtype=torch.float64)
            kept: list[tuple[torch.Tensor, torch.Tensor]] = []
            for batch in batches:
                outputs, targets = (forward or _forward)(model, batch)
                totals[-1] += 1
                for i, (name, metric) in enumerate(callables.items()):
                    value, count = _measure(name, metric, outputs, targets)
                    totals[2 * i] += value
                    totals[2 * i + 1] += count
                if objects:
                    kept.append((outputs, targets))
        comm.all_reduce(totals).wait()
        if totals[-1] == 0:
            raise ConfigError("evaluate: the data set is empty: there is nothing to measure")
        results: dict[str, Any] = {}
        for i, name in enumerate(callables):
            if totals[2 * i + 1] == 0:
                raise ConfigError(f"evaluate: metric {name!r} counted nothing (its counts add up to 0)")
            results[name] = float(totals[2 * i] / totals[2 * i + 1])
        results.update(_compute_objects(objects, kept, comm))
    return {name: results[name] for name in metrics}


def _sort_metrics(metrics: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metric objects (torchmetrics and alike: update, compute, reset), and plain callables."""
    if not metrics:
        raise ConfigError("evaluate: no metrics given; for example metrics={'accuracy': correct_and_count}")
    objects = {
        name: m for name, m in metrics.items() if all(hasattr(m, a) for a in ("update", "compute", "reset"))
    }
    callables = {name: m for name, m in metrics.items() if name not in objects}
    for name, metric in callables.items():
        if not callable(metric):
            raise ConfigError(
                f"evaluate: metric {name!r} must be a callable (outputs, targets) -> (sum, count) or have"
                f" update, compute and reset; got {type(metric).__name__}"
            )
    return callables, objects


def _measure(name: str, metric: Metric, outputs: Outputs, targets: Outputs) -> tuple[float, float]:
    result = metric(outputs, targets)
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise ConfigError(
            f"evaluate: metric {name!r} must return (sum, count) over the batch, got {type(result).__name__}"
        )
    return float(result[0]), float(result[1])


def _forward(model: nn.Module, batch: Batch) -> tuple[Outputs, Outputs]:
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        raise ConfigError(
            f"evaluate: batches of (inputs…, targets) expected, got {type(batch).__name__}; pass"
            " forward=function(model, batch) -> (outputs, targets)"
        )
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    *inputs, targets = (one.to(device) if isinstance(one, torch.Tensor) else one for one in batch)
    return model(*inputs), targets


def _batches(data: Data, comm: Communicator, batch_size: int | None) -> Iterator[Batch]:
    """This rank's batches; together the ranks' batches are the whole set, each sample once."""
    source = data.source if isinstance(data, ShardedLoader) else data
    dataset = source.dataset if isinstance(source, DataLoader) else source
    loader = source if isinstance(source, DataLoader) else None
    if isinstance(dataset, IterableDataset):
        whole = loader if loader is not None else DataLoader(dataset, batch_size=batch_size or _DEFAULT_BATCH)
        return (batch for i, batch in enumerate(whole) if i % comm.size == comm.rank)
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ConfigError(f"evaluate: a Dataset or a DataLoader expected, got {type(data).__name__}")
    indices = _indices(dataset, loader, comm)
    if not indices:
        raise ConfigError("evaluate: the data set is empty: there is nothing to measure")
    low, high = share(len(indices), comm.rank, comm.size)
    settings: dict[str, Any] = {"batch_size": batch_size or _DEFAULT_BATCH}
    if loader is not None:
        settings["batch_size"] = batch_size or loader.batch_size or _DEFAULT_BATCH
        settings["collate_fn"] = loader.collate_fn
        settings["num_workers"] = loader.num_workers
    return iter(DataLoader(Subset(dataset, indices[low:high]), **settings))


def _indices(dataset: Sized, loader: DataLoader[Any] | None, comm: Communicator) -> Sequence[int]:
    everything = range(len(dataset))
    if loader is None or (loader.batch_size is None and loader.batch_sampler is None):
        return everything
    sampler = loader.sampler
    if isinstance(sampler, SequentialSampler) and loader.batch_size is not None:
        return everything
    if isinstance(sampler, RandomSampler) and not sampler.replacement and sampler.num_samples == len(dataset):
        return everything
    chosen: Iterable[int] = sampler
    if loader.batch_size is None:
        chosen = (i for batch in loader.batch_sampler or () for i in batch) if comm.rank == 0 else ()
    drawn: list[int] = plain.broadcast(list(chosen) if comm.rank == 0 else [], comm)
    return drawn


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Put modes, buffers and random states back."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    random = random_state.capture()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        random_state.restore(random)


@contextmanager
def consensus(attachments: Sequence[Attachment], comm: Communicator) -> Iterator[None]:
    """Hold the consensus model instead of this rank's replica."""
    backups: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        for attachment in attachments:
            attachment.replica.adopt()
            flats = attachment.strategy.consensus()
            if flats is not None:
                for mine, agreed in zip(attachment.replica.parameters, flats, strict=True):
                    backups.append((mine, mine.clone()))
                    mine.copy_(agreed)
            if comm.size > 1:
                preparation.average_buffers(attachment.replica.buffers(), attachment.comm)
        yield
    finally:
        for mine, before in backups:
            mine.copy_(before)


def _compute_objects(
    objects: dict[str, Any], kept: list[tuple[torch.Tensor, torch.Tensor]], comm: Communicator
) -> dict[str, Any]:
    """Metric objects see the outputs and targets of all ranks, in the data's order, in one update."""
    if not objects:
        return {}
    outputs, targets = ([pair[column] for pair in kept] for column in (0, 1))
    all_outputs, all_targets = gather_rows(outputs, comm), gather_rows(targets, comm)
    results = {}
    for name, metric in objects.items():
        metric.reset()
        # Every rank holds all samples already: torchmetrics must not add the ranks up again.
        switches = {a: getattr(metric, a) for a in ("sync_on_compute", "_to_sync") if hasattr(metric, a)}
        for attribute in switches:
            setattr(metric, attribute, False)
        metric.update(all_outputs, all_targets)
        value = metric.compute()
        for attribute, before in switches.items():
            setattr(metric, attribute, before)
        metric.reset()
        is_number = isinstance(value, torch.Tensor) and value.numel() == 1
        results[name] = float(value) if is_number else value
    return results


def gather_rows(parts: list[torch.Tensor], comm: Communicator) -> torch.Tensor:
    """Concatenate tensors along dim 0 over all ranks; a rank may have none."""
    mine = torch.cat(parts) if parts else None
    kind = None if mine is None else [list(mine.shape[1:]), str(mine.dtype).removeprefix("torch.")]
    rows = torch.zeros(comm.size, dtype=torch.int64)
    rows[comm.rank] = 0 if mine is None else len(mine)
    comm.all_reduce(rows).wait()
    # Data is divided from the front: rank 0 has rows if anyone has, so its shapes speak for all.
    trailing, dtype_name = plain.broadcast(kind, comm)
    dtype = getattr(torch, dtype_name)
    row_numel = int(torch.tensor(trailing).prod()) if trailing else 1
    source = torch.empty(0, dtype=dtype) if mine is None else mine.cpu().contiguous().view(-1)
    output = torch.empty(int(rows.sum()) * row_numel, dtype=dtype)
    comm.all_gather_v(output, source, counts=[int(n) * row_numel for n in rows]).wait()
    return output.view(-1, *trailing)
