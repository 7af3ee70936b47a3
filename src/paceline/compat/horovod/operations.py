"""The collectives of Horovod's public interface: asynchronous forms, handles, and their waiting forms."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from paceline.compat.horovod.compression import Compression, Compressor
from paceline.compat.horovod.constants import Adasum, Average, Operation, choose
from paceline.compat.horovod.engine import Handle
from paceline.compat.horovod.perform import SubmittedOperation
from paceline.compat.horovod.request import Request, describe
from paceline.compat.horovod.world import ProcessSet, current, global_process_set, on_init

_handles: dict[int, Handle] = {}
_numbers = itertools.count()
_unnamed: defaultdict[str, itertools.count[int]] = defaultdict(itertools.count)


def submit(
    kind: str,
    tensors: Sequence[Tensor],
    *,
    name: str | None,
    process_set: ProcessSet,
    outputs: Sequence[Tensor] = (),
    is_list: bool = False,
    **options: Any,
) -> int:
    """Queue one operation of this rank; return the handle's number."""
    if process_set.process_set_id is None:
        raise ValueError(f"{process_set} is not registered: give it to hvd.init() or hvd.add_process_set()")
    if not process_set.included():
        raise ValueError(f"rank {current().comm.rank} is not in {process_set}")
    set_id = process_set.process_set_id
    # Unnamed operations match in the order of their calls, per kind and process set.
    label = f"noname.{next(_unnamed[f'{kind}/{set_id}'])}" if name is None else name
    request = Request(f"{kind}.{label}", kind, process_set=set_id, **describe(tensors), **options)
    handle = current().engine.submit(SubmittedOperation(request, tensors, outputs, is_list=is_list))
    number = next(_numbers)
    _handles[number] = handle
    return number


# All ranks number unnamed operations from zero after `init`.
on_init(_unnamed.clear)


def poll(handle: int) -> bool:
    """Whether `synchronize(handle)` would return at once."""
    return _handles[handle].done.is_set()


def synchronize(handle: int) -> Any:
    """Wait for an asynchronous operation and return its result; HorovodInternalError if it failed."""
    if handle not in _handles:
        raise ValueError(f"handle {handle} does not exist or was synchronized before")
    waiting = _handles.pop(handle)
    waiting.done.wait()
    if waiting.error is not None:
        raise waiting.error
    entry = waiting.entry
    if entry.request.kind == "alltoall":
        received = torch.tensor(entry.received, dtype=torch.int32)
        return (entry.results[0], received) if entry.is_list else entry.results[0]
    return list(entry.results) if entry.is_list else (entry.results[0] if entry.results else None)


def _reduce(
    tensors: Sequence[Tensor],
    outputs: Sequence[Tensor],
    name: str | None,
    op: Operation,
    prescale_factor: float,
    postscale_factor: float,
    process_set: ProcessSet,
    is_list: bool,
) -> int:
    if op is Adasum and (prescale_factor != 1.0 or postscale_factor != 1.0):
        raise NotImplementedError("Adasum takes no prescale or postscale factor: scale the tensor yourself")
    if is_list and len({(t.dtype, t.device) for t in tensors}) > 1:
        raise ValueError("grouped operations take tensors of one dtype and device")
    return submit(
        "allreduce",
        tensors,
        name=name,
        process_set=process_set,
        outputs=outputs,
        is_list=is_list,
        op=op.name,
        prescale=float(prescale_factor),
        postscale=float(postscale_factor),
    )


def allreduce_async(
    tensor: Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: Operation | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> int:
    """Reduce `tensor` over the ranks into a new tensor; return a handle."""
    chosen, output = choose(op, average), torch.empty_like(tensor)
    return _reduce([tensor], [output], name, chosen, prescale_factor, postscale_factor, process_set, False)


def allreduce_async_(
    tensor: Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: Operation | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> int:
    """Reduce `tensor` over the ranks in place; return a handle."""
    chosen = choose(op, average)
    return _reduce([tensor], [tensor], name, chosen, prescale_factor, postscale_factor, process_set, False)


def grouped_allreduce_async(
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: Operation | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> int:
    """Reduce several tensors as one operation into new tensors; return a handle."""
    chosen, outputs = choose(op, average), [torch.empty_like(t) for t in tensors]
    return _reduce(list(tensors), outputs, name, chosen, prescale_factor, postscale_factor, process_set, True)


def grouped_allreduce_async_(
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: Operation | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> int:
    """Reduce several tensors as one operation in place; return a handle."""
    chosen, given = choose(op, average), list(tensors)
    return _reduce(given, given, name, chosen, prescale_factor, postscale_factor, process_set, True)


def allgather_async(
    tensor: Tensor, name: str | None = None, process_set: ProcessSet = global_process_set
) -> int:
    """Concatenate the ranks' tensors along the first dimension, whose size may differ; return a handle."""
    return submit("allgather", [_at_least_1d(tensor)], name=name, process_set=process_set)


def grouped_allgather_async(
    tensors: Sequence[Tensor], name: str | None = None, process_set: ProcessSet = global_process_set
) -> int:
    """`allgather` of several tensors as one operation; return a handle."""
    given = [_at_least_1d(t) for t in tensors]
    return submit("allgather", given, name=name, process_set=process_set, is_list=True)


def broadcast_async(
    tensor: Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> int:
    """Return a handle whose result is a new tensor with `root_rank`'s values (its rank in the job)."""
    output = torch.empty_like(tensor)
    root = _place(root_rank, process_set)
    return submit("broadcast", [tensor], name=name, process_set=process_set, outputs=[output], root=root)


def broadcast_async_(
    tensor: Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> int:
    """Overwrite `tensor` with `root_rank`'s values; return a handle."""
    root = _place(root_rank, process_set)
    return submit("broadcast", [tensor], name=name, process_set=process_set, outputs=[tensor], root=root)


def alltoall_async(
    tensor: Tensor,
    splits: Tensor | Sequence[int] | None = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> int:
    """Send `splits[i]` rows to rank i (default: equal shares); return a handle."""
    size = process_set.size()
    if splits is None:
        if tensor.shape[0] % size:
            raise ValueError(f"alltoall without splits: {tensor.shape[0]} rows do not divide by {size} ranks")
        rows = [tensor.shape[0] // size] * size
    else:
        rows = [int(n) for n in splits]
        if len(rows) != size or min(rows) < 0 or sum(rows) != tensor.shape[0]:
            raise ValueError(
                f"splits must be {size} counts that add up to {tensor.shape[0]} rows; got {rows}"
            )
    has_splits = splits is not None
    return submit("alltoall", [tensor], name=name, process_set=process_set, is_list=has_splits, splits=rows)


def reducescatter_async(
    tensor: Tensor,
    name: str | None = None,
    op: Operation = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> int:
    """Reduce, and keep this rank's share of the rows (the first ranks get one more); return a handle."""
    return grouped_reducescatter_async(
        [tensor], name, op, process_set, prescale_factor, postscale_factor, _is_list=False
    )


def grouped_reducescatter_async(
    tensors: Sequence[Tensor],
    name: str | None = None,
    op: Operation = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    *,
    _is_list: bool = True,
) -> int:
    """`reducescatter` of several tensors as one operation; return a handle."""
    if op is Adasum:
        raise NotImplementedError("reducescatter with Adasum: use Sum or Average, or allreduce with Adasum")
    return submit(
        "reducescatter",
        list(tensors),
        name=name,
        process_set=process_set,
        is_list=_is_list,
        op=choose(op, None).name,
        prescale=float(prescale_factor),
        postscale=float(postscale_factor),
    )


def sparse_allreduce_async(
    tensor: Tensor, name: str, op: Operation, process_set: ProcessSet = global_process_set
) -> Any:
    """Reduce a sparse tensor by gathering indices and values; return a function that waits for the result."""
    given = tensor.coalesce()
    indices = allgather_async(given.indices().t().contiguous(), f"{name}.indices", process_set)
    values = allgather_async(given.values(), f"{name}.values", process_set)

    def wait() -> Tensor:
        all_indices, all_values = synchronize(indices), synchronize(values)
        if op is Average:
            all_values = all_values / process_set.size()
        return torch.sparse_coo_tensor(all_indices.t(), all_values, given.shape).coalesce()

    return wait


def join(device: int = -1) -> int:
    """Say that this rank has no more data: it feeds zeros to the others' all-reduces until all have joined.

    Returns the rank that joined last. `device` exists for compatibility.
    """
    handle = current().engine.submit(SubmittedOperation(Request("join", "join")))
    handle.done.wait()
    if handle.error is not None:
        raise handle.error
    return handle.last_joined


def barrier(process_set: ProcessSet = global_process_set) -> None:
    """Wait until every rank of the process set is here."""
    synchronize(submit("barrier", [], name=None, process_set=process_set))


def compressed(tensor: Tensor, compression: type[Compressor] | None) -> tuple[Tensor, torch.dtype | None]:
    """Return what `compression` sends for `tensor`, and its context."""
    return (compression or Compression.none).compress(tensor)


def _at_least_1d(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() else tensor.reshape(1)


def _place(root_rank: int, process_set: ProcessSet) -> int:
    ranks = process_set.ranks or []
    if root_rank not in ranks:
        raise ValueError(f"root rank {root_rank} is not one of the ranks {ranks}")
    return ranks.index(root_rank)
