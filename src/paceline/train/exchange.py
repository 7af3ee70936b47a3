"""What people who write their own loops exchange: sums of metrics, and plain objects without pickle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from paceline.errors import ConfigError, Mismatch
from paceline.train import plain
from paceline.types import Communicator


def all_reduce_metrics(values: Mapping[str, Any], comm: Communicator) -> dict[str, float]:
    """Add up `(sum, count)` pairs over the ranks and return sum / count; plain numbers are added up.

    Float sums travel as float64. Raises Mismatch when ranks give different names.
    """
    names = sorted(values)
    pairs = [v if isinstance(v, (tuple, list)) else (v, None) for v in (values[n] for n in names)]
    if any(len(p) != 2 for p in pairs):
        raise ConfigError("all_reduce_metrics takes numbers and (sum, count) pairs")
    everyone = gather_objects(names, comm)
    if any(other not in (names, None) for other in everyone):
        raise Mismatch(f"rank {comm.rank}: all_reduce_metrics: ranks give different names: {everyone}")
    flat = torch.tensor([[float(s), 0.0 if c is None else float(c)] for s, c in pairs], dtype=torch.float64)
    if names:
        comm.all_reduce(flat).wait()
    result = {}
    for name, (_, count), (total, counted) in zip(names, pairs, flat.tolist(), strict=True):
        if count is not None and counted == 0:
            raise ConfigError(f"all_reduce_metrics: {name!r} was counted zero times on all ranks")
        result[name] = total if count is None else total / counted
    return result


def gather_objects(value: object, comm: Communicator) -> list[Any]:
    """Return every rank's value, in rank order: numbers, strings, lists, dicts and tensors; nothing is
    executed. None from ranks that died and that the job goes on without.

    Values travel in torch's format and are read with `weights_only`. ConfigError for other types.
    """
    value = plain.simple(value, functions=True)
    try:
        data = plain.pack(value)
        plain.unpack(data)
    except Exception as error:
        raise ConfigError(
            f"rank {comm.rank}: gather_objects carries numbers, strings, lists, dicts and tensors; got"
            f" {type(value).__name__} that is or holds something else: {str(error).splitlines()[0]:.200}."
            " Give tensors for arrays (torch.from_numpy), and plain values for objects"
        ) from error
    if comm.size == 1:
        return [value]
    sizes = torch.zeros(comm.size, dtype=torch.int64)
    comm.all_gather(sizes, torch.tensor([data.numel()])).wait()
    counts = sizes.tolist()
    gathered = torch.empty(sum(counts), dtype=torch.uint8)
    comm.all_gather_v(gathered, data, counts=counts).wait()
    parts = torch.split(gathered, counts)
    return [plain.unpack(p) if p.numel() else None for p in parts]
