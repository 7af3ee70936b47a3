"""Exact distributed evaluation: sums and counts travel, never means; no sample is padded or seen twice.

The strategy's consensus model is evaluated, and training goes on as if nothing had happened: parameters,
buffers, train/eval modes and random states are put back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from paceline.errors import ConfigError
from paceline.train import exchange, preparation, random_state
from paceline.train.attachment import Attachment
from paceline.train.data import evaluation
from paceline.train.data.fingerprint import check_same, digest
from paceline.train.data.loader import ShardedLoader
from paceline.train.replica import compact, real
from paceline.types import Batch, Communicator

Outputs: TypeAlias = Any
"""What the model or the data gives, of whatever kind the metrics take."""
Forward = Callable[[nn.Module, Batch], tuple[Any, Any]]
"""(model, batch) → (outputs, targets), of whatever kind the metrics take."""
Metric = Callable[[Any, Any], tuple[Any, Any]]
"""(outputs, targets) → (sum, count), numbers or one-element tensors."""
Data = Dataset[Any] | DataLoader[Any] | ShardedLoader
Kept = list[tuple[int, Any, Any]]
"""Place in the data's order, outputs and targets of this rank's batches."""


def evaluate(
    model: nn.Module,
    data: Data,
    metrics: Mapping[str, Any],
    comm: Communicator,
    attachments: Sequence[Attachment],
    *,
    batch_size: int | None = None,
    forward: Forward | None = None,
    average: bool = False,
) -> dict[str, Any]:
    """The metrics of `model` over all of `data`, equal on every rank; see `Job.evaluate`."""
    callables, objects = _sort_metrics(metrics)
    with _undisturbed(model, evaluation.generators(data)), torch.no_grad():
        batches = evaluation.own_batches(data, comm, batch_size)
        with consensus(attachments, comm), _same_everywhere(model, attachments, comm, average=average):
            model.eval()
            totals = torch.zeros(len(callables) * 2 + 1, dtype=torch.float64)
            kept: Kept = []
            for place, batch in batches:
                outputs, targets = (forward or _forward)(model, batch)
                totals[-1] += 1
                for i, (name, metric) in enumerate(callables.items()):
                    value, count = _measure(name, metric, outputs, targets)
                    totals[2 * i] += value
                    totals[2 * i + 1] += count
                if objects:
                    kept.append((place, outputs, targets))
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
    for part in result:
        if isinstance(part, torch.Tensor) and part.numel() != 1:
            raise ConfigError(
                f"evaluate: metric {name!r} returned a tensor of shape {list(part.shape)}; its sum and its"
                " count must be one number each: give one metric per number"
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


@contextmanager
def _undisturbed(model: nn.Module, generators: Sequence[torch.Generator]) -> Iterator[None]:
    """Put modes, buffers and random states back."""
    drawn = [(one, one.get_state()) for one in generators]
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(b, b.clone()) for b in (compact(one.detach()) for one in model.buffers())]
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
        for generator, before in drawn:
            generator.set_state(before)


@contextmanager
def consensus(attachments: Sequence[Attachment], comm: Communicator) -> Iterator[None]:
    """Hold the consensus model instead of this rank's replica, which comes back with its buffers."""
    backups: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        for attachment in attachments:
            attachment.replica.adopt()
            flats = attachment.strategy.consensus()
            if flats is not None:
                for mine, agreed in zip(attachment.replica.parameters, flats, strict=True):
                    backups.append((mine, mine.clone()))
                    mine.copy_(agreed)
            buffers = preparation.shared_state(attachment.replica, attachment.comm)
            backups += [(buffer, buffer.detach().clone()) for buffer in buffers]
            if comm.size > 1:
                preparation.average_buffers(buffers, attachment.comm)
        yield
    finally:
        with torch.no_grad():
            for mine, before in backups:
                mine.copy_(before)


def holders(model: nn.Module, attachments: Sequence[Attachment]) -> list[Attachment]:
    """Those of the attachments that train a parameter of `model`."""
    own = {id(p) for p in model.parameters()}
    return [a for a in attachments if any(id(p) in own for p in a.module.parameters())]


def not_prepared(model: nn.Module, held: Sequence[Attachment]) -> list[tuple[str, torch.Tensor]]:
    """Names and tensors of `model` with elements that are in no module of `held`."""
    known = {id(t) for a in held for t in [*a.module.parameters(), *a.module.buffers()]}
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [(name, t) for name, t in tensors if t.numel() and id(t) not in known]


@contextmanager
def _same_everywhere(
    model: nn.Module, attachments: Sequence[Attachment], comm: Communicator, *, average: bool
) -> Iterator[None]:
    """Refuse, or average for a while, what is not of a prepared model and differs over the ranks."""
    if comm.size == 1 or not any(t.numel() for t in [*model.parameters(), *model.buffers()]):
        yield
        return
    copies = not_prepared(model, attachments)
    tensors = [real(compact(tensor.detach())) for _, tensor in copies]
    backups = [t.clone() for t in tensors] if average else []
    if average:
        preparation.average_buffers(tensors, comm)
    else:
        check_same(
            f"evaluate: {type(model).__name__}, which is no prepared model, or a buffer of it,",
            digest([list(one) for one in copies], whole=True),
            comm,
            "Evaluate the mean over the ranks with job.evaluate(…, average=True), or give the prepared model",
        )
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, before in zip(tensors, backups, strict=False):
                tensor.copy_(before)


def _compute_objects(objects: dict[str, Any], kept: Kept, comm: Communicator) -> dict[str, Any]:
    """Metric objects see the outputs and targets of all ranks, in the data's order.

    In one update, or batch after batch where batches differ in kind.
    """
    if not objects:
        return {}
    pairs = gather_pairs(kept, comm)
    results = {}
    for name, metric in objects.items():
        metric.reset()
        # Every rank holds all samples already: torchmetrics must not add the ranks up again.
        switches = {a: getattr(metric, a) for a in ("sync_on_compute", "_to_sync") if hasattr(metric, a)}
        for attribute in switches:
            setattr(metric, attribute, False)
        for outputs, targets in pairs:
            metric.update(outputs, targets)
        value = metric.compute()
        for attribute, before in switches.items():
            setattr(metric, attribute, before)
        metric.reset()
        is_number = isinstance(value, torch.Tensor) and value.numel() == 1
        results[name] = float(value) if is_number else value
    return results


def gather_pairs(kept: Kept, comm: Communicator) -> list[tuple[Any, Any]]:
    """Outputs and targets of all ranks in the data's order: one pair if they are rows of one kind."""
    kept = [(place, _on_cpu(outputs), _on_cpu(targets)) for place, outputs, targets in kept]
    facts = [[place, _rows_of(outputs), _rows_of(targets)] for place, outputs, targets in kept]
    ranks = [rank or [] for rank in exchange.gather_objects(facts, comm)]
    every = [one for rank in ranks for one in rank]
    kinds: list[Any] = [[None if rows is None else rows[1:] for rows in one[1:]] for one in every]
    if any(kind != kinds[0] or None in kind for kind in kinds):
        gathered = exchange.gather_objects([list(one) for one in kept], comm)
        ordered = sorted((one for rank in gathered for one in rank or ()), key=_place)
        return [(outputs, targets) for _, outputs, targets in ordered]
    order = sorted(range(len(every)), key=lambda i: _place(every[i]))
    columns = []
    for column in (1, 2):
        counts = [sum(one[column][0] for one in rank) for rank in ranks]
        rows = _gather_rows([list[Any](one)[column] for one in kept], counts, kinds[0][column - 1], comm)
        parts = torch.split(rows, [one[column][0] for one in every])
        columns.append(torch.cat([parts[i] for i in order]))
    return [(columns[0], columns[1])]


def _place(one: Sequence[Any]) -> int:
    return int(one[0])


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(_on_cpu(one) for one in value)
    return value


def _rows_of(value: Any) -> list[Any] | None:
    """Number, shape and dtype of a tensor's rows; None of anything else."""
    if not isinstance(value, torch.Tensor) or not value.ndim or value.layout is not torch.strided:
        return None
    return [len(value), list(value.shape[1:]), str(value.dtype).removeprefix("torch.")]


def _gather_rows(
    own: list[torch.Tensor], counts: list[int], kind: tuple[list[int], str], comm: Communicator
) -> torch.Tensor:
    """All ranks' rows, rank after rank; `kind` is a row's shape and dtype."""
    trailing, dtype = kind[0], getattr(torch, kind[1])
    row_numel = math.prod(trailing)
    source = torch.cat(own).contiguous().view(-1) if own else torch.empty(0, dtype=dtype)
    output = torch.empty(sum(counts) * row_numel, dtype=dtype)
    comm.all_gather_v(output, source, counts=[n * row_numel for n in counts]).wait()
    return output.view(sum(counts), *trailing)
