"""The collectives of Horovod's public interface: asynchronous forms, handles, and their waiting forms."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from paceline.compat.horovod.compression import Compression, Compressor
from paceline.compat.horovod.constants import Adasum, Average, HorovodInternalError, Operation, choose
from paceline.compat.horovod.engine import Handle
from paceline.compat.horovod.perform import SubmittedOperation
from paceline.compat.horovod.request import Request, describe
from paceline.compat.horovod.world import ProcessSet, current, global_process_set, members, on_init, place_in

_handles: dict[int, Handle] = {}
_numbers = itertools.count()


class _UnnamedOperations:
    """Names for operations without one: equal on all ranks that make the same calls.

    A rank that joins misses calls of the others, so all count from zero again after a join.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin as after `init`."""
        self._joins = 0
        self._counts: defaultdict[str, itertools.count[int]] = defaultdict(itertools.count)

    def all_have_joined(self) -> None:
        """Count from zero under names that were not used before the join."""
        self._joins += 1
        self._counts.clear()

    def next(self, kind: str, process_set: int) -> str:
        """Return a name; they match in the order of the calls, per kind and process set."""
        return f"noname.{self._joins}.{next(self._counts[f'{kind}/{process_set}'])}"


_unnamed = _UnnamedOperations()


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
    place_in(process_set)
    set_id = process_set.process_set_id
    assert set_id is not None
    _check(kind, tensors, outputs)
    label = _unnamed.next(kind, set_id) if name is None else name
    request = Request(f"{kind}.{label}", kind, process_set=set_id, **describe(tensors), **options)
    handle = current().engine.submit(SubmittedOperation(request, tensors, outputs, is_list=is_list))
    number = next(_numbers)
    _handles[number] = handle
    return number


def _check(kind: str, tensors: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """Refuse here what the engine cannot do: there, the error would reach every rank."""
    if not tensors and kind != "barrier":
        raise ValueError(f"{kind}: at least one tensor expected, got none")
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{kind}: tensors expected, got {type(tensor).__name__}")
        if tensor.layout is not torch.strided or tensor.is_quantized:
            raise ValueError(
                f"{kind}: tensor type {tensor.type()} is not supported: pass tensor.to_dense(), or use "
                "sparse_allreduce_async"
            )
        if kind in ("alltoall", "reducescatter") and not tensor.dim():
            raise HorovodInternalError(
                f"{kind}: a tensor with rows expected, got a scalar; reshape it to [1]"
            )
    for output in outputs:
        if any(n > 1 and not step for n, step in zip(output.shape, output.stride(), strict=True)):
            raise ValueError(
                f"{kind} in place: a tensor whose elements have memory of their own expected, got one that "
                "expand() made; pass tensor.contiguous()"
            )


on_init(_unnamed.restart)


def poll(handle: int) -> bool:
    """Whether `synchronize(handle)` would return at once."""
    if handle not in _handles:
        raise ValueError(f"handle {handle} was not created or has been cleared")
    return _handles[handle].done.is_set()


def synchronize(handle: int) -> Any:
    """Wait for an asynchronous operation and return its result.

    Args:
        handle: What the asynchronous form returned.

    Returns:
        The tensor, or a list for grouped operations; for alltoall with splits also how many rows came from
        each rank. None if the handle is unknown or was synchronized before, as Horovod has it.

    Raises:
        HorovodInternalError: The operation failed, on this rank or on another.
    """
    waiting = _handles.pop(handle, None)
    if waiting is None:
        return None
    waiting.wait()
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
    size = len(members(process_set))
    if op is Adasum and size & (size - 1):
        raise NotImplementedError(f"Adasum needs a power of two of ranks; this process set has {size}")
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
    return submit("allgather", [at_least_1d(tensor)], name=name, process_set=process_set)


def grouped_allgather_async(
    tensors: Sequence[Tensor], name: str | None = None, process_set: ProcessSet = global_process_set
) -> int:
    """`allgather` of several tensors as one operation; return a handle."""
    given = [at_least_1d(t) for t in tensors]
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
    _check("alltoall", [tensor], [])
    size = len(members(process_set))
    rows = equal_splits(tensor, process_set) if splits is None else [int(n) for n in splits]
    if len(rows) != size or min(rows) < 0 or sum(rows) != tensor.shape[0]:
        raise ValueError(f"splits must be {size} counts that add up to {tensor.shape[0]} rows; got {rows}")
    has_splits = splits is not None
    return submit("alltoall", [tensor], name=name, process_set=process_set, is_list=has_splits, splits=rows)


def equal_splits(tensor: Tensor, process_set: ProcessSet) -> list[int]:
    """Return the same number of rows for every rank; ValueError if rows do not divide by the ranks."""
    _check("alltoall", [tensor], [])
    size = len(members(process_set))
    if tensor.shape[0] % size:
        raise ValueError(f"alltoall without splits: {tensor.shape[0]} rows do not divide by {size} ranks")
    return [tensor.shape[0] // size] * size


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
            all_values = all_values / len(members(process_set))
        return torch.sparse_coo_tensor(all_indices.t(), all_values, given.shape).coalesce()

    return wait


def join(device: int = -1) -> int:
    """Say that this rank has no more data: it feeds zeros to the others' all-reduces until all have joined.

    Returns the rank that joined last. `device` exists for compatibility.
    """
    handle = current().engine.submit(SubmittedOperation(Request("join", "join")))
    handle.wait()
    _unnamed.all_have_joined()
    return handle.number


def barrier(process_set: ProcessSet = global_process_set) -> None:
    """Wait until every rank of the process set is here."""
    synchronize(submit("barrier", [], name=None, process_set=process_set))


def compressed(tensor: Tensor, compression: type[Compressor] | None) -> tuple[Tensor, torch.dtype | None]:
    """Return what `compression` sends for `tensor`, and its context."""
    return (compression or Compression.none).compress(tensor)


def at_least_1d(tensor: Tensor) -> Tensor:
    """Return a scalar as a tensor with one row, and any other tensor as it is."""
    return tensor if tensor.dim() else tensor.reshape(1)


def _place(root_rank: int, process_set: ProcessSet) -> int:
    ranks = members(process_set)
    if root_rank not in ranks:
        raise ValueError(f"root rank {root_rank} is not one of the ranks {ranks}")
    return ranks.index(root_rank)
