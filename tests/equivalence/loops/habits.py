"""Habits that cannot equal one process: generated loops have them to see that each is refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

REFUSALS = {
    "step_in_hook": r"step\(\), after backward",
    "second_optimizer": r"that prepare\(\) was not given",
    "replaces": r"steps what prepare\(\) did not see",
    "unfreezes": r"steps what prepare\(\) did not see",
    "max_norm": r"max_norm",
    "zip": r"an iterator over this loader is open",
    "other_data": r"differs from rank 0's",
    "endless": r"num_samples",
}
"""By habit, what the refusal says: the mistake, or the line that mends it."""


def once_prepared(run: Any) -> None:
    """What the loop does right after `prepare`."""
    habit = run.c["habit"]
    if habit == "step_in_hook":
        optimizer, parameter = run.optimizers[0], run.trained()[0]
        parameter.register_post_accumulate_grad_hook(lambda p: optimizer.step())
    elif habit == "replaces":
        run.optimizers[0].add_param_group({"params": [nn.Parameter(torch.zeros(3, dtype=torch.float64))]})
    elif habit == "unfreezes":
        for p in run.models[0].parameters():
            p.requires_grad_(True)


def at_epoch(run: Any) -> None:
    """What it does when an epoch begins."""
    if run.c["habit"] == "zip":
        for _ in zip(run.loader, run.loader, strict=True):
            pass


def at_step(run: Any) -> None:
    """What it does in every minibatch."""
    if run.c["habit"] == "second_optimizer":
        other = torch.optim.SGD([p for p in run.models[0].parameters() if p.requires_grad], lr=0.01)
        other.step()
