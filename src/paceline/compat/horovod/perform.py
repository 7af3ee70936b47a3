"""What each operation does once all ranks have agreed to perform it now."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from paceline.compat.horovod.constants import BY_NAME, Adasum, Average
from paceline.compat.horovod.request import Request, Response, dtype_of
from paceline.schedule.program import chunk_offsets
from paceline.train.modules.flat_tensors import unflatten
from paceline.types import Communicator


@dataclass(eq=False)
class SubmittedOperation:
    """One submitted operation of this rank."""

    request: Request
    tensors: Sequence[Tensor] = ()
    outputs: Sequence[Tensor] = ()
    """Where results go (allreduce, broadcast); the inputs themselves for the in-place forms."""
    results: list[Tensor] = field(default_factory=list)
    received: list[int] = field(default_factory=list)
    """alltoall: rows that came from each rank."""
    is_list: bool = False
    in_inference_mode: bool = field(default_factory=torch.is_inference_mode_enabled)
    """Whether the caller was in torch.inference_mode(), which belongs to its thread."""


def perform(comm: Communicator, response: Response, entries: Sequence[SubmittedOperation]) -> None:
    """Run `response` and leave results in `entries`, which follow its requests."""
    with _mode_of(entries):
        _perform(comm, response, entries)


def _mode_of(entries: Sequence[SubmittedOperation]) -> AbstractContextManager[object]:
    """Return the context in which tensors made in inference mode may be changed, if there are any."""
    if any(e.in_inference_mode or any(t.is_inference() for t in e.outputs) for e in entries):
        return torch.inference_mode()
    # inference_mode(False) would turn gradients on.
    return nullcontext()


def _perform(comm: Communicator, response: Response, entries: Sequence[SubmittedOperation]) -> None:
    kind = response.requests[0].kind
    if kind == "allreduce":
        _all_reduce(comm, entries)
    elif kind == "allgather":
        _all_gather(comm, response.rows, entries[0])
    elif kind == "broadcast":
        _broadcast(comm, entries[0])
    elif kind == "alltoall":
        _all_to_all(comm, response.rows, entries[0])
    elif kind == "reducescatter":
        _reduce_scatter(comm, entries[0])
    else:
        comm.barrier().wait()


def stand_in(request: Request) -> SubmittedOperation:
    """Return the zeros with which a joined rank takes part in others' all-reduces."""
    zeros = [torch.zeros(s, dtype=dtype_of(d)) for s, d in zip(request.shapes, request.dtypes, strict=True)]
    return SubmittedOperation(request, zeros, zeros)


def scale(tensor: Tensor, factor: float, divisor: int = 1) -> None:
    """Multiply by `factor / divisor` in place, with Horovod's rounding.

    Integers are scaled in float64 and truncated towards zero. 16-bit floats are scaled in float32 and rounded
    once, so the product with `factor` alone need not fit their range. Without a factor, tensors are divided
    rather than multiplied by a reciprocal, which is rounded: a third of 3 is 1.
    """
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        if factor != 1.0:
            tensor.mul_(factor / divisor)
        elif divisor != 1:
            tensor.div_(divisor)
    elif factor != 1.0 or divisor != 1:
        tensor.copy_((tensor.double() * factor / divisor).trunc())


def _all_reduce(comm: Communicator, entries: Sequence[SubmittedOperation]) -> None:
    request = entries[0].request
    sources = [t for e in entries for t in e.tensors]
    targets = [t for e in entries for t in e.outputs]
    op = BY_NAME[request.op]
    if op is Adasum:
        for source, target in zip(sources, targets, strict=True):
            target.copy_(adasum(comm, source))
    else:
        assert op.reduce_op is not None
        alone = len(sources) == 1 and targets[0].is_contiguous()
        flat = targets[0] if alone else sources[0].new_empty(sum(t.numel() for t in sources))
        if alone and sources[0] is not flat:
            flat.copy_(sources[0])
        elif not alone:
            torch.cat([t.reshape(-1) for t in sources], out=flat)
        scale(flat, request.prescale)
        comm.all_reduce(flat, op=op.reduce_op).wait()
        scale(flat, request.postscale, comm.size if op is Average else 1)
        if not alone:
            unflatten(flat, targets)
    for entry in entries:
        entry.results = list(entry.outputs)


def adasum(comm: Communicator, tensor: Tensor) -> Tensor:
    """Adaptive sum: the mean of parallel gradients, the sum of orthogonal ones.

    Source: Maleki et al., MLSys 2021. Every rank gathers all gradients and folds them pairwise in rank order,
    so the results are equal bit for bit; P must be a power of two.
    """
    gathered = tensor.new_empty((comm.size, tensor.numel()))
    comm.all_gather(gathered.view(-1), tensor.contiguous().view(-1)).wait()
    parts = list(gathered.double())
    while len(parts) > 1:
        parts = [_adasum_pair(parts[i], parts[i + 1]) for i in range(0, len(parts), 2)]
    result: Tensor = parts[0].to(tensor.dtype).view(tensor.shape)
    return result


def _adasum_pair(a: Tensor, b: Tensor) -> Tensor:
    dot, aa, bb = torch.dot(a, b), torch.dot(a, a), torch.dot(b, b)
    left = 1 - dot / (2 * aa) if aa > 0 else torch.ones(())
    right = 1 - dot / (2 * bb) if bb > 0 else torch.ones(())
    return left * a + right * b


def _all_gather(comm: Communicator, rows: Sequence[Sequence[int]], entry: SubmittedOperation) -> None:
    for i, tensor in enumerate(entry.tensors):
        row = math.prod(tensor.shape[1:])
        counts = [r[i] * row for r in rows]
        output = tensor.new_empty((sum(r[i] for r in rows), *tensor.shape[1:]))
        comm.all_gather_v(output.view(-1), tensor.contiguous().view(-1), counts=counts).wait()
        entry.results.append(output)


def _broadcast(comm: Communicator, entry: SubmittedOperation) -> None:
    source, target = entry.tensors[0], entry.outputs[0]
    flat = target if target.is_contiguous() else target.contiguous()
    if source is not target:
        flat.copy_(source)
    comm.broadcast(flat, root=entry.request.root).wait()
    if flat is not target:
        target.copy_(flat)
    entry.results = [target]


def _all_to_all(comm: Communicator, rows: Sequence[Sequence[int]], entry: SubmittedOperation) -> None:
    tensor = entry.tensors[0]
    row = math.prod(tensor.shape[1:])
    entry.received = [r[comm.rank] for r in rows]
    output = tensor.new_empty((sum(entry.received), *tensor.shape[1:]))
    comm.all_to_all_v(
        output.view(-1),
        tensor.contiguous().view(-1),
        output_counts=[n * row for n in entry.received],
        source_counts=[n * row for n in entry.request.splits],
    ).wait()
    entry.results = [output]


def _reduce_scatter(comm: Communicator, entry: SubmittedOperation) -> None:
    request = entry.request
    op = BY_NAME[request.op]
    assert op.reduce_op is not None
    for tensor in entry.tensors:
        row = math.prod(tensor.shape[1:])
        offsets = chunk_offsets(tensor.shape[0], comm.size).tolist()
        sizes = [b - a for a, b in pairwise(offsets)]
        source = tensor.contiguous().view(-1)
        if request.prescale != 1.0:
            source = source.clone()
            scale(source, request.prescale)
        output = tensor.new_empty((sizes[comm.rank], *tensor.shape[1:]))
        counts = [n * row for n in sizes]
        comm.reduce_scatter_v(output.view(-1), source, counts=counts, op=op.reduce_op).wait()
        scale(output, request.postscale, comm.size if op is Average else 1)
        entry.results.append(output)
