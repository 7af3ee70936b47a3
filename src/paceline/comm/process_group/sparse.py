"""all_reduce of sparse tensors: indices and values of all ranks are gathered and added, as gloo does."""

from __future__ import annotations

import torch
import torch.distributed as dist

from paceline.comm.native.communicator import NativeCommunicator
from paceline.comm.process_group.arguments import Operator
from paceline.errors import ConfigError
from paceline.types import CallOptions

_SUM = hash(dist.ReduceOp.SUM)


def all_reduce(
    comm: NativeCommunicator, tensor: torch.Tensor, op: Operator, options: CallOptions
) -> torch.Tensor:
    """Replace a COO `tensor` by the sum over ranks, coalesced, and return the sum.

    Ranks may have different numbers of entries. Blocks until done: how much there is to gather is known only
    when every rank has told its number of entries.

    Args:
        comm: The ranks.
        tensor: Sparse COO tensor on the CPU; of the same shape and sparse dimensions on all ranks.
        op: SUM is the only one supported.
        options: Options of the operations of the fabric.

    Raises:
        ConfigError: For other layouts, devices and operators, and if the shapes differ between ranks.
    """
    if tensor.layout is not torch.sparse_coo or hash(op) != _SUM or not tensor.is_cpu:
        raise ConfigError(
            f"unsupported layout: paceline backend reduces sparse COO tensors on the CPU with SUM, got"
            f" {tensor.layout} on {tensor.device} with {op}"
        )
    with torch.no_grad():
        mine = tensor.detach().coalesce()
        own_values, own_indices = mine.values(), mine.indices()
        num_entries = own_indices.shape[1]
        shape = torch.tensor([num_entries, mine.sparse_dim(), *mine.shape], dtype=torch.int64)
        shapes = torch.empty(comm.size * shape.numel(), dtype=torch.int64)
        comm.start_all_gather(shapes, shape, options).wait()
        rows = shapes.view(comm.size, -1)
        if not bool((rows[:, 1:] == rows[0, 1:]).all()):
            raise ConfigError("Sparse dimensions do not match: ranks gave sparse tensors of different shapes")
        counts = rows[:, 0].tolist()
        entry_numel = own_values.shape[1:].numel()
        depth = mine.sparse_dim()
        indices = torch.empty(sum(counts), depth, dtype=torch.int64)
        values = torch.empty(sum(counts), *own_values.shape[1:], dtype=tensor.dtype)
        own = own_indices.t().contiguous()
        first = comm.start_all_gather_v(indices, own, [c * depth for c in counts], options)
        numels = [c * entry_numel for c in counts]
        second = comm.start_all_gather_v(values, own_values.contiguous(), numels, options)
        first.wait()
        second.wait()
        total = torch.sparse_coo_tensor(indices.t(), values, tensor.shape).coalesce()
        tensor.copy_(total)
    return total
