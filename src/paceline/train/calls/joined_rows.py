"""Values of all ranks' rows as one: nested tensors, arrays and plain objects, rank after rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from paceline.errors import ConfigError, Mismatch
from paceline.train import exchange
from paceline.types import Communicator


def gather(values: Any, comm: Communicator, *, counts: bool, own: int) -> Any:
    """`values` with the rows of all ranks in rank order; see `job.gather_for_metrics`.

    Args:
        values: Nested tensors, NumPy arrays and objects.
        comm: The ranks; all call this.
        counts: Whether this rank's rows count.
        own: How many samples this rank has in the batch.
    """
    leaves, structure = pytree.tree_flatten(values, is_leaf=_is_rows)
    facts = [str(structure), [_kind(leaf) for leaf in leaves]]
    sent = [_sent(leaf) for leaf in leaves] if counts else []
    is_list = counts and _has_one_for_each(values, own)
    told = [one for one in exchange.gather_objects([facts, counts, sent, is_list], comm) if one is not None]
    if any(one[3] for one in told):
        raise ConfigError(
            f"rank {comm.rank}: job.gather_for_metrics: a list with a tensor for each sample is taken for a"
            " structure of batches; stack them, or give a list with a dict for each sample:"
            ' [{"x": tensor} for tensor in tensors]'
        )
    if others := [r for r, one in enumerate(told) if one[0] != told[0][0]]:
        raise Mismatch(
            f"rank {comm.rank}: job.gather_for_metrics: ranks {[0, *others]} give different values, as"
            f" {told[0][0]} and {told[others[0]][0]}: structure, dtypes and all dimensions but the first must"
            " be equal. For tensors of another shape for each sample, give a list with a dict for each sample"
        )
    columns = zip(*(one[2] for one in told if one[1]), strict=True)
    return pytree.tree_unflatten(
        [_joined(leaf, column) for leaf, column in zip(leaves, columns, strict=True)], structure
    )


def _has_one_for_each(values: Any, own: int) -> bool:
    """Whether there is a list with as many tensors as samples, which are no batches themselves."""
    if isinstance(values, dict):
        return any(_has_one_for_each(one, own) for one in values.values())
    if not isinstance(values, (list, tuple)):
        return False
    if any(_has_one_for_each(one, own) for one in values):
        return True
    is_list = isinstance(values, list) and len(values) == own > 1
    if not (is_list and all(isinstance(one, (torch.Tensor, np.ndarray)) for one in values)):
        return False
    return any(one.ndim == 0 or len(one) != own for one in values)


def _is_rows(value: Any) -> bool:
    """A list of plain objects has one for each sample; one of tensors or arrays is a structure."""
    return isinstance(value, list) and not any(isinstance(v, (torch.Tensor, np.ndarray)) for v in value)


def _kind(leaf: Any) -> str:
    """What must be equal on all ranks."""
    if isinstance(leaf, (torch.Tensor, np.ndarray)):
        return f"{type(leaf).__name__} {leaf.dtype} {list(leaf.shape[1:])} {min(leaf.ndim, 1)}"
    return "rows" if isinstance(leaf, list) else "object"


def _sent(leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray) and leaf.dtype.kind not in "biufc":
        raise ConfigError(
            f"job.gather_for_metrics: a NumPy array of numbers expected, got dtype {leaf.dtype}: .tolist()"
            " makes a list, whose entries are joined"
        )
    if isinstance(leaf, torch.Tensor) and leaf.layout is not torch.strided:
        raise ConfigError(
            f"job.gather_for_metrics: dense tensors expected, got layout {leaf.layout}; use .to_dense()"
        )
    if isinstance(leaf, np.ndarray):
        leaf = torch.from_numpy(np.ascontiguousarray(leaf).reshape(leaf.shape))
    if isinstance(leaf, torch.Tensor):
        # A clone: of a view, only what it shows travels.
        return leaf.detach().cpu().clone(memory_format=torch.contiguous_format)
    return leaf


def _joined(leaf: Any, parts: Sequence[Any]) -> Any:
    if isinstance(leaf, (torch.Tensor, np.ndarray)):
        whole = torch.cat([part if part.ndim else part.reshape(1) for part in parts])
        return whole.numpy() if isinstance(leaf, np.ndarray) else whole.to(leaf.device)
    return [one for part in parts for one in part] if isinstance(leaf, list) else list(parts)
