"""What outer methods read from the state of the workers' optimizers: its kind, and what is averaged."""

from __future__ import annotations

import torch

from paceline.errors import Mismatch
from paceline.types import Communicator, ReduceOp, Replica, Work


def averaged_tensors(replica: Replica) -> list[torch.Tensor]:
    """State that can be averaged: floating-point tensors that are not scalars (step counters are)."""
    return [tensor for _, tensor in replica.optimizer_state() if _is_averaged(tensor)]


_ADAPTIVE = {"exp_avg_sq", "exp_inf", "square_avg", "sum"}


def is_adaptive(replica: Replica) -> bool:
    """Whether the optimizer divides gradients by their size, as Adam does; known after its first step."""
    return any(key in _ADAPTIVE for key, _ in replica.optimizer_state())


def check_count(work: Work, totals: torch.Tensor, count: int, comm: Communicator) -> None:
    """Raise Mismatch unless all ranks have `count` tensors; totals[2] is their sum once `work` is done."""
    work.wait()
    if totals[2] != count * comm.size:
        raise Mismatch(
            f"rank {comm.rank}: local_sgd(average_optimizer=true): the optimizer has {count} tensors of"
            f" state here and another number elsewhere ({totals[2]:g} in all): a parameter got no gradient on"
            " some rank yet; use average_optimizer=false"
        )


def unify_counters(replica: Replica, comm: Communicator) -> None:
    """Set every step counter to the largest of all ranks."""
    state = [tensor for _, tensor in replica.optimizer_state()]
    counters = [tensor for tensor in state if not _is_averaged(tensor)]
    if counters:
        scalars = [counter for counter in counters if counter.numel() == 1]
        flat = torch.stack([scalar.detach().double().reshape(()) for scalar in scalars])
        comm.all_reduce(flat, op=ReduceOp.MAX).wait()
        for scalar, value in zip(scalars, flat, strict=True):
            scalar.fill_(value.item())


def _is_averaged(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and tensor.ndim > 0
