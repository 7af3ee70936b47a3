"""Nothing of a simulated job stays in the process."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
from runs import on
from small import data, model, step
from torch.utils.data import DataLoader

from paceline.train.job import Job


def test_a_simulation_keeps_no_model_and_no_hook() -> None:
    def loop(job: Job) -> Any:
        net: Any = model()
        optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.1)
        net, optimizer, loader = job.prepare(net, optimizer, DataLoader(data(), 6), precision="bf16")
        for batch in loader:
            step(net, optimizer, batch)
        return net

    nets = on(2, loop)
    assert not any("forward" in vars(net) for net in nets)
    assert not any(net._forward_pre_hooks for net in nets)
    kept = [weakref.ref(net) for net in nets]
    del nets
    gc.collect()
    assert not any(ref() for ref in kept)
