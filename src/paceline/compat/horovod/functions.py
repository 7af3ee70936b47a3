"""Broadcasts of models, optimizers and objects.

Object collectives carry any Python object, so they pickle, by the definition of this interface. The bytes
move only between ranks of one job that authenticated each other.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from paceline.compat.horovod import operations as o
from paceline.compat.horovod import world
from paceline.compat.horovod.world import ProcessSet, global_process_set


def broadcast_parameters(
    params: Mapping[str, Any] | Iterable[Any], root_rank: int, process_set: ProcessSet = global_process_set
) -> None:
    """Overwrite parameters in place with those of `root_rank`.

    `params`: `model.state_dict()`, `model.named_parameters()` or `model.parameters()`.
    """
    if isinstance(params, Mapping):
        named = sorted(params.items())
    elif isinstance(params, Iterable) and not isinstance(params, str | Tensor):
        named = [p if isinstance(p, tuple) else (None, p) for p in params]
    else:
        raise ValueError(
            f"invalid params of type {type(params).__name__}: a dict or an iterable of parameters expected"
        )
    handles = [
        o.broadcast_async_(p.detach(), root_rank, name, process_set)
        for name, p in named
        if isinstance(p, Tensor)
    ]
    for handle in handles:
        o.synchronize(handle)


def broadcast_optimizer_state(
    optimizer: torch.optim.Optimizer,
    root_rank: int,
    model: torch.nn.Module | None = None,
    process_set: ProcessSet = global_process_set,
) -> None:
    """Give every rank the optimizer state and options of `root_rank`.

    A rank whose optimizer has not stepped yet gets gradients of zero, as with Horovod; no step is made.

    Args:
        optimizer: May be fresh on any rank, also on all.
        root_rank: Whose state counts, a rank of the job.
        model: Tells which parameters have sparse gradients: those of sparse embeddings.
        process_set: The ranks that take part; default all.

    Raises:
        ValueError: An LBFGS optimizer.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("cannot broadcast torch.optim.LBFGS state: its history is not a flat set of tensors")
    state = optimizer.state_dict()
    if not state["state"]:
        _give_zero_gradients(optimizer, model)
    is_root = world.rank() == root_rank
    tensors: list[Tensor] = []
    plan = _without_tensors(state, tensors) if is_root else None
    plan, layout = broadcast_object(
        (plan, [(t.shape, t.dtype) for t in tensors]), root_rank, process_set=process_set
    )
    if not is_root:
        tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in layout]
    handles = [o.broadcast_async_(t, root_rank, None, process_set) for t in tensors]
    for handle in handles:
        o.synchronize(handle)
    if not is_root:
        optimizer.load_state_dict(_with_tensors(plan, tensors))


def _give_zero_gradients(optimizer: torch.optim.Optimizer, model: torch.nn.Module | None) -> None:
    embeddings = [m for m in model.modules() if isinstance(m, torch.nn.Embedding)] if model else []
    sparse = {m.weight for m in embeddings if m.sparse}
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.requires_grad and p.grad is None:
                zeros = torch.zeros_like(p)
                is_sparse = isinstance(optimizer, torch.optim.SparseAdam) or p in sparse
                p.grad = zeros.to_sparse(1) if is_sparse else zeros


class _Place:
    """Stands for the tensor number `index`."""

    def __init__(self, index: int) -> None:
        self.index = index


def _without_tensors(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors.append(value if value.is_contiguous() else value.contiguous())
        return _Place(len(tensors) - 1)
    if isinstance(value, dict):
        return {k: _without_tensors(v, tensors) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_without_tensors(v, tensors) for v in value)
    return value


def _with_tensors(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, _Place):
        return tensors[value.index]
    if isinstance(value, dict):
        return {k: _with_tensors(v, tensors) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_with_tensors(v, tensors) for v in value)
    return value


def _to_tensor(obj: object) -> Tensor:
    buffer = io.BytesIO()
    pickle.dump(obj, buffer)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def broadcast_object(
    obj: object = None,
    root_rank: int = 0,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """Return `root_rank`'s object on every rank."""
    if world.rank() == root_rank:
        data = _to_tensor(obj)
        sizes = torch.tensor([data.numel()])
    else:
        data, sizes = torch.empty(0, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    prefix = name or "broadcast_object"
    o.synchronize(o.broadcast_async_(sizes, root_rank, f"{prefix}.size", process_set))
    if data.numel() != int(sizes):
        data = torch.empty(int(sizes), dtype=torch.uint8)
    o.synchronize(o.broadcast_async_(data, root_rank, f"{prefix}.data", process_set))
    return pickle.loads(bytes(data.numpy()))


def broadcast_object_fn(
    root_rank: int = 0, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Any:
    """Return a function that broadcasts its argument."""
    return lambda obj: broadcast_object(obj, root_rank, name, process_set)


def allgather_object(
    obj: object, name: str | None = None, process_set: ProcessSet = global_process_set
) -> list[Any]:
    """Return every rank's object, in rank order."""
    data = _to_tensor(obj)
    prefix = name or "allgather_object"
    sizes = o.synchronize(o.allgather_async(torch.tensor([data.numel()]), f"{prefix}.size", process_set))
    gathered = o.synchronize(o.allgather_async(data, f"{prefix}.data", process_set))
    return [pickle.loads(bytes(part.numpy())) for part in gathered.split(sizes.tolist())]
