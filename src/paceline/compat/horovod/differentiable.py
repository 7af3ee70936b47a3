"""The waiting forms of the collectives; gradients flow through those that return new tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from paceline.compat.horovod import operations as o
from paceline.compat.horovod.compression import Compression, Compressor
from paceline.compat.horovod.constants import Average, Operation, Sum, choose
from paceline.compat.horovod.world import ProcessSet, global_process_set

# Every collective is linear, so its gradient is its transpose: another collective.
# mypy: disable-error-code="no-untyped-call, no-any-return, misc"

Context = Any
"""torch's context of an autograd function: each function keeps on it what its own backward needs."""


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, tensor: Tensor, name: str | None, *options: Any) -> Tensor:
        ctx.options = options
        return o.synchronize(o.allreduce_async(tensor, None, name, *options))

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> Any:
        return o.synchronize(o.allreduce_async(grad.contiguous(), None, None, *ctx.options)), *[None] * 5


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, tensor: Tensor, name: str | None, process_set: ProcessSet) -> Tensor:
        ctx.rows, ctx.process_set = tensor.shape[0], process_set
        return o.synchronize(o.allgather_async(tensor, name, process_set))

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> Any:
        summed = o.synchronize(o.allreduce_async(grad.contiguous(), op=Sum, process_set=ctx.process_set))
        rows = o.synchronize(o.allgather_async(torch.tensor([ctx.rows]), process_set=ctx.process_set))
        start = int(rows[: ctx.process_set.rank()].sum())
        return summed[start : start + ctx.rows], None, None


class _Broadcast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, tensor: Tensor, root: int, name: str | None, process_set: ProcessSet) -> Tensor:
        ctx.is_root, ctx.process_set = process_set.ranks[process_set.rank()] == root, process_set  # type: ignore[index]
        return o.synchronize(o.broadcast_async(tensor, root, name, process_set))

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> Any:
        summed = o.synchronize(o.allreduce_async(grad.contiguous(), op=Sum, process_set=ctx.process_set))
        return summed if ctx.is_root else torch.zeros_like(summed), None, None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context,
        tensor: Tensor,
        splits: Sequence[int] | Tensor | None,
        name: str | None,
        process_set: ProcessSet,
    ) -> Any:
        rows = splits if splits is not None else [tensor.shape[0] // process_set.size()] * process_set.size()
        output, received = o.synchronize(o.alltoall_async(tensor, rows, name, process_set))
        ctx.received, ctx.process_set = received, process_set
        ctx.mark_non_differentiable(received)
        return output, received

    @staticmethod
    def backward(ctx: Context, grad: Tensor, _: Tensor) -> Any:
        handle = o.alltoall_async(grad.contiguous(), ctx.received, process_set=ctx.process_set)
        return o.synchronize(handle)[0], None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context, tensor: Tensor, name: str | None, op: Operation, process_set: ProcessSet, *scales: float
    ) -> Tensor:
        ctx.op, ctx.process_set, ctx.scales = op, process_set, scales
        return o.synchronize(o.reducescatter_async(tensor, name, op, process_set, *scales))

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> Any:
        factor = ctx.scales[0] * ctx.scales[1]
        if ctx.op is Average:
            factor /= ctx.process_set.size()
        gathered = o.synchronize(o.allgather_async(grad * factor, process_set=ctx.process_set))
        return gathered, *[None] * 5


def allreduce(
    tensor: Tensor,
    average: bool | None = None,
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: Operation | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Tensor:
    """Return the average (or sum, …) over the ranks; differentiable."""
    sent, ctx = o.compressed(tensor, compression)
    reduced = _AllReduce.apply(
        sent, name, choose(op, average), prescale_factor, postscale_factor, process_set
    )
    return compression.decompress(reduced, ctx)


def allreduce_(
    tensor: Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: Operation | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Tensor:
    """Reduce `tensor` in place and return it."""
    handle = o.allreduce_async_(tensor, average, name, op, prescale_factor, postscale_factor, process_set)
    return o.synchronize(handle)


def grouped_allreduce(
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: Operation | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> list[Tensor]:
    """Reduce several tensors as one operation; returns new tensors."""
    sent, contexts = zip(*[o.compressed(t, compression) for t in tensors], strict=True)
    handle = o.grouped_allreduce_async(
        sent, average, name, op, prescale_factor, postscale_factor, process_set
    )
    return [compression.decompress(t, c) for t, c in zip(o.synchronize(handle), contexts, strict=True)]


def grouped_allreduce_(
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: Operation | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> list[Tensor]:
    """Reduce several tensors as one operation in place."""
    return o.synchronize(
        o.grouped_allreduce_async_(tensors, average, name, op, prescale_factor, postscale_factor, process_set)
    )


def allgather(
    tensor: Tensor, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Tensor:
    """Return the ranks' tensors concatenated along the first dimension; differentiable."""
    given = tensor if tensor.dim() else tensor.reshape(1)
    return _AllGather.apply(given, name, process_set)


def grouped_allgather(
    tensors: Sequence[Tensor], name: str | None = None, process_set: ProcessSet = global_process_set
) -> list[Tensor]:
    """`allgather` of several tensors as one operation."""
    return o.synchronize(o.grouped_allgather_async(tensors, name, process_set))


def broadcast(
    tensor: Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Tensor:
    """Return a new tensor with `root_rank`'s values; differentiable."""
    return _Broadcast.apply(tensor, root_rank, name, process_set)


def broadcast_(
    tensor: Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Tensor:
    """Overwrite `tensor` with `root_rank`'s values and return it."""
    return o.synchronize(o.broadcast_async_(tensor, root_rank, name, process_set))


def alltoall(
    tensor: Tensor,
    splits: Tensor | Sequence[int] | None = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """Exchange rows; returns the received rows, and with `splits` also how many came from each rank."""
    if splits is None and tensor.shape[0] % process_set.size():
        raise ValueError(
            f"alltoall without splits: {tensor.shape[0]} rows do not divide by {process_set.size()} ranks"
        )
    output, received = _AllToAll.apply(tensor, splits, name, process_set)
    return output if splits is None else (output, received)


def reducescatter(
    tensor: Tensor,
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: Operation = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Tensor:
    """Return this rank's share of the reduced rows; differentiable."""
    sent, ctx = o.compressed(tensor, compression)
    reduced = _ReduceScatter.apply(sent, name, op, process_set, prescale_factor, postscale_factor)
    return compression.decompress(reduced, ctx)


def grouped_reducescatter(
    tensors: Sequence[Tensor],
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: Operation = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> list[Tensor]:
    """`reducescatter` of several tensors as one operation."""
    sent, contexts = zip(*[o.compressed(t, compression) for t in tensors], strict=True)
    handle = o.grouped_reducescatter_async(sent, name, op, process_set, prescale_factor, postscale_factor)
    return [compression.decompress(t, c) for t, c in zip(o.synchronize(handle), contexts, strict=True)]
