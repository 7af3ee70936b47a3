"""What the collectives mean: functions over the arguments of all ranks that came, in rank order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from paceline.errors import Mismatch, PeerLost
from paceline.types import Rank, ReduceOp


def all_reduce(op: ReduceOp, tensors: dict[Rank, torch.Tensor]) -> None:
    """Every rank gets the combination of all contributions."""
    total = reduced(list(tensors.values()), op)
    for t in tensors.values():
        t.copy_(total)


def reduce(op: ReduceOp, root: Rank, tensors: dict[Rank, torch.Tensor]) -> None:
    """The root gets the combination of all."""
    argument_of(root, tensors).copy_(reduced(list(tensors.values()), op))


def broadcast(root: Rank, tensors: dict[Rank, torch.Tensor]) -> None:
    """Every rank gets the root's tensor."""
    source = argument_of(root, tensors)
    for rank, t in tensors.items():
        if rank != root:
            t.copy_(source)


def gather(counts: list[int], arguments: dict[Rank, Any]) -> None:
    """Ranks that have an output get every rank's source, in rank order."""
    offsets = offsets_of(counts)
    for output, _ in arguments.values():
        if output is not None:
            flat = output.view(-1)
            for rank, (_, source) in arguments.items():
                flat[offsets[rank] : offsets[rank] + counts[rank]].copy_(source.reshape(-1))


def reduce_scatter(op: ReduceOp, counts: list[int], arguments: dict[Rank, Any]) -> None:
    """Rank r gets its slice of the combination."""
    total = reduced([source.reshape(-1) for _, source in arguments.values()], op)
    offsets = offsets_of(counts)
    for rank, (output, _) in arguments.items():
        output.view(-1).copy_(total[offsets[rank] : offsets[rank] + counts[rank]])


def scatter(root: Rank, arguments: dict[Rank, Any]) -> None:
    """Rank r gets slice r of the root's source."""
    source = argument_of(root, arguments)[1].reshape(-1)
    for rank, (output, _) in arguments.items():
        output.view(-1).copy_(source[rank * output.numel() : (rank + 1) * output.numel()])


def all_to_all(arguments: dict[Rank, Any]) -> None:
    """Rank r gets slice r of every rank's source."""
    for dst, (output, _, output_counts, _) in arguments.items():
        offsets, flat = offsets_of(output_counts), output.view(-1)
        for src, (_, source, _, source_counts) in arguments.items():
            if source_counts[dst] != output_counts[src]:
                raise Mismatch(
                    f"all_to_all: rank {src} gives {source_counts[dst]} elements to rank {dst}, "
                    f"which expects {output_counts[src]}"
                )
            begin = offsets_of(source_counts)[dst]
            flat[offsets[src] : offsets[src] + output_counts[src]].copy_(
                source.reshape(-1)[begin : begin + source_counts[dst]]
            )


def argument_of(root: Rank, arguments: dict[Rank, Any]) -> Any:
    """The root's argument; PeerLost if it is dead."""
    if root not in arguments:
        raise PeerLost(f"the root, rank {root}, is lost: its process ended")
    return arguments[root]


def offsets_of(counts: Sequence[int]) -> list[int]:
    """Where each slice begins."""
    return [sum(counts[:i]) for i in range(len(counts))]


def reduced(tensors: Sequence[torch.Tensor], op: ReduceOp) -> torch.Tensor:
    """Combine in order, the first to the last; half precision in float32. Returns a new tensor."""
    dtype = tensors[0].dtype
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    total = tensors[0].to(wide, copy=True)
    for t in tensors[1:]:
        _ACCUMULATE[op](total, t.to(wide))
    return (divided(total, len(tensors)) if op is ReduceOp.MEAN else total).to(dtype)


def divided(total: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """The mean from the sum: integers are truncated towards zero, complex numbers divided by parts."""
    if total.is_complex():
        torch.view_as_real(total).div_(num_ranks)  # a division of complex numbers would round twice
        return total
    if total.is_floating_point():
        return total.div_(num_ranks)
    wide = total.to(torch.int64) if total.itemsize < 8 else total  # P need not fit a narrow integer
    return wide.div_(num_ranks, rounding_mode="trunc")


_ACCUMULATE: dict[ReduceOp, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    ReduceOp.SUM: lambda a, b: a.add_(b),
    ReduceOp.MEAN: lambda a, b: a.add_(b),
    ReduceOp.PRODUCT: lambda a, b: a.mul_(b),
    ReduceOp.MIN: lambda a, b: a.copy_(torch.minimum(a, b)),
    ReduceOp.MAX: lambda a, b: a.copy_(torch.maximum(a, b)),
    ReduceOp.BAND: lambda a, b: a.bitwise_and_(b),
    ReduceOp.BOR: lambda a, b: a.bitwise_or_(b),
    ReduceOp.BXOR: lambda a, b: a.bitwise_xor_(b),
}
