"""Agreement on optimizer state that is averaged: as many tensors everywhere, the largest step counters."""

from __future__ import annotations

from typing import Any

import torch

from paceline.errors import Mismatch
from paceline.types import Communicator, ReduceOp, Work


def check_count(work: Work, totals: torch.Tensor, count: int, comm: Communicator) -> None:
    """Mismatch unless all ranks have `count` tensors; totals[2] holds the sum once `work` is done."""
    work.wait()
    if totals[2] != count * comm.size:
        raise Mismatch(
            f"rank {comm.rank}: local_sgd(average_optimizer=true): the optimizer has {count} tensors of"
            f" state here and another number elsewhere ({totals[2]:g} in all): a parameter got no gradient on"
            " some rank yet; use average_optimizer=false"
        )


def unify_counters(replica: Any, comm: Communicator) -> None:
    """Step counters become the largest of all ranks."""
    counters = [t for _, t in replica.optimizer_state() if not (t.is_floating_point() and t.ndim)]
    if counters:
        flat = torch.stack([c.detach().double().reshape(()) for c in counters if c.numel() == 1])
        comm.all_reduce(flat, op=ReduceOp.MAX).wait()
        for counter, value in zip([c for c in counters if c.numel() == 1], flat, strict=True):
            counter.fill_(value.item())
