"""all_reduce of sparse tensors: indices and values of all ranks are gathered and added, as gloo does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from paceline.comm.native.work import DONE
from paceline.comm.process_group.work import C10dWork
from paceline.errors import ConfigError

if TYPE_CHECKING:
    from paceline.comm.process_group.group import PacelineGroup

_SUM = hash(dist.ReduceOp.SUM)


def all_reduce(group: PacelineGroup, tensor: torch.Tensor, op: Any) -> dist.Work:
    """Replace a COO `tensor` by the sum over ranks, coalesced; ranks may have different numbers of entries.

    Raises ConfigError for other layouts than COO and other operators than SUM. Blocks until done: how much is
    to be gathered is known only when every rank has said how many entries it has.
    """
    if tensor.layout is not torch.sparse_coo or hash(op) != _SUM or not tensor.is_cpu:
        raise ConfigError(
            f"unsupported layout: paceline backend reduces sparse COO tensors on the CPU with SUM, got"
            f" {tensor.layout} on {tensor.device} with {op}"
        )
    comm = group._comm
    with torch.no_grad():
        mine = tensor.detach().coalesce()
        shape = torch.tensor([mine._nnz(), mine.sparse_dim(), *mine.shape], dtype=torch.int64)
        shapes = torch.empty(comm.size * shape.numel(), dtype=torch.int64)
        comm.start_all_gather(shapes, shape).wait()
        rows = shapes.view(comm.size, -1)
        if not bool((rows[:, 1:] == rows[0, 1:]).all()):
            raise ConfigError("Sparse dimensions do not match: ranks gave sparse tensors of different shapes")
        counts = rows[:, 0].tolist()
        entry = (
            mine.values().numel() // max(mine._nnz(), 1)
            if mine._nnz()
            else mine.values()[0:0].shape[1:].numel()
        )
        depth = mine.sparse_dim()
        indices = torch.empty(sum(counts), depth, dtype=torch.int64)
        values = torch.empty(sum(counts), *mine.values().shape[1:], dtype=tensor.dtype)
        own = mine.indices().t().contiguous()
        first = comm.start_all_gather_v(indices, own, [c * depth for c in counts])
        second = comm.start_all_gather_v(values, mine.values().contiguous(), [c * entry for c in counts])
        first.wait()
        second.wait()
        total = torch.sparse_coo_tensor(indices.t(), values, tensor.shape).coalesce()
        tensor.copy_(total)
    group._sequence += 1
    return C10dWork(DONE, [total])
