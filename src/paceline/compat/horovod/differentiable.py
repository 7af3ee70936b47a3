"""The waiting forms of the collectives; gradients flow through those that return new tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from paceline.compat.horovod import operations as o
from paceline.compat.horovod.compression import Compression, Compressor
from paceline.compat.horovod.constants import Average, Operation, Sum, choose
from paceline.compat.horovod.world import ProcessSet, global_process_set, members, place_in, rank

# Gradients are Horovod's: those of the average over the ranks. Of a loss that every rank computes, they are
# the exact derivative; of the sum of all ranks' losses, 1/P of it.
# mypy: disable-error-code="no-untyped-call, no-any-return, misc"

Context = Any
"""torch's context of an autograd function: each function keeps on it what its own backward needs."""


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context, name: str | None, is_list: bool, options: Sequence[Any], *tensors: Tensor
    ) -> Any:
        ctx.is_list, ctx.options = is_list, options
        if is_list:
            return tuple(o.synchronize(o.grouped_allreduce_async(tensors, None, name, *options)))
        return o.synchronize(o.allreduce_async(tensors[0], None, name, *options))

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> Any:
        return None, None, None, *_all_reduced(grads, ctx.is_list, *ctx.options)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context, name: str | None, is_list: bool, process_set: ProcessSet, *tensors: Tensor
    ) -> Any:
        ctx.is_list, ctx.rows, ctx.process_set = is_list, [t.shape[0] for t in tensors], process_set
        if is_list:
            return tuple(o.synchronize(o.grouped_allgather_async(tensors, name, process_set)))
        return o.synchronize(o.allgather_async(tensors[0], name, process_set))

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> Any:
        reduced = _all_reduced(grads, ctx.is_list, Average, 1.0, 1.0, ctx.process_set)
        # [P, number of tensors]: how many rows every rank gave.
        rows = o.synchronize(o.allgather_async(torch.tensor([ctx.rows]), process_set=ctx.process_set))
        starts = rows[: place_in(ctx.process_set)].sum(0).tolist()
        own = [g[start : start + n] for g, start, n in zip(reduced, starts, ctx.rows, strict=True)]
        return None, None, None, *own


class _Broadcast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, tensor: Tensor, root: int, name: str | None, process_set: ProcessSet) -> Tensor:
        ctx.is_root, ctx.process_set = rank() == root, process_set
        return o.synchronize(o.broadcast_async(tensor, root, name, process_set))

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> Any:
        (reduced,) = _all_reduced([grad], False, Average, 1.0, 1.0, ctx.process_set)
        return reduced if ctx.is_root else torch.zeros_like(reduced), None, None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context,
        tensor: Tensor,
        splits: Sequence[int] | Tensor,
        name: str | None,
        process_set: ProcessSet,
    ) -> Any:
        output, received = o.synchronize(o.alltoall_async(tensor, splits, name, process_set))
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
        ctx: Context, name: str | None, is_list: bool, options: Sequence[Any], *tensors: Tensor
    ) -> Any:
        ctx.is_list, ctx.options = is_list, options
        if is_list:
            return tuple(o.synchronize(o.grouped_reducescatter_async(tensors, name, *options)))
        return o.synchronize(o.reducescatter_async(tensors[0], name, *options))

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> Any:
        op, process_set, prescale, postscale = ctx.options
        factor = prescale * postscale * (len(members(process_set)) if op is Sum else 1)
        scaled = [(g * factor).to(g.dtype) for g in grads]
        if ctx.is_list:
            gathered = o.synchronize(o.grouped_allgather_async(scaled, None, process_set))
        else:
            gathered = [o.synchronize(o.allgather_async(scaled[0], None, process_set))]
        return None, None, None, *gathered


def _all_reduced(grads: Sequence[Tensor], is_list: bool, *options: Any) -> list[Tensor]:
    given = [g.contiguous() for g in grads]
    if is_list:
        return o.synchronize(o.grouped_allreduce_async(given, None, None, *options))
    return [o.synchronize(o.allreduce_async(given[0], None, None, *options))]


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
    options = (choose(op, average), prescale_factor, postscale_factor, process_set)
    reduced = _AllReduce.apply(name, False, options, sent)
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
    """Reduce several tensors as one operation; returns new tensors; differentiable."""
    pairs = [o.compressed(t, compression) for t in tensors]
    options = (choose(op, average), prescale_factor, postscale_factor, process_set)
    reduced = _AllReduce.apply(name, True, options, *[t for t, _ in pairs])
    return [compression.decompress(t, c) for t, (_, c) in zip(reduced, pairs, strict=True)]


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
    return _AllGather.apply(name, False, process_set, o.at_least_1d(tensor))


def grouped_allgather(
    tensors: Sequence[Tensor], name: str | None = None, process_set: ProcessSet = global_process_set
) -> list[Tensor]:
    """`allgather` of several tensors as one operation; differentiable."""
    return list(_AllGather.apply(name, True, process_set, *[o.at_least_1d(t) for t in tensors]))


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
    rows = o.equal_splits(tensor, process_set) if splits is None else splits
    output, received = _AllToAll.apply(tensor, rows, name, process_set)
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
    options = (op, process_set, prescale_factor, postscale_factor)
    reduced = _ReduceScatter.apply(name, False, options, sent)
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
    """`reducescatter` of several tensors as one operation; differentiable."""
    pairs = [o.compressed(t, compression) for t in tensors]
    options = (op, process_set, prescale_factor, postscale_factor)
    reduced = _ReduceScatter.apply(name, True, options, *[t for t, _ in pairs])
    return [compression.decompress(t, c) for t, (_, c) in zip(reduced, pairs, strict=True)]
