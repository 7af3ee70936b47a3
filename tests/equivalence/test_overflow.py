"""An overflow on one rank reaches every rank's GradScaler, whatever encodes the gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from runs import on
from small import data, model
from torch.nn import functional

from paceline.train.job import Job

CODECS = [
    "threshold(tau=0.001)",
    "int8",
    "error_feedback(codec=onebit)",
    "powersgd(rank=2)",
    "topk(density=0.1)",
]


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("codec", [None, *CODECS])
def test_all_ranks_skip_the_step_and_go_on(codec: str | None, bad: float) -> None:
    def loop(job: Job) -> Any:
        net: Any = model(torch.float32)
        optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.1)
        strategy = "all_reduce" if codec is None else f"all_reduce(codec={codec})"
        net, optimizer = job.prepare(net, optimizer, strategy=strategy)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        x, y = data(36).tensors
        x, y = x[job.rank :: job.size].float(), y[job.rank :: job.size]
        changed = []
        for step in range(4):
            before = [p.detach().clone() for p in net.parameters()]
            loss = functional.cross_entropy(net(x), y)
            if step == 1 and job.rank == 1:
                loss = loss + bad * net[2].weight[0, 0]
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            changed.append(any(not torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True)))
        finite = all(bool(p.isfinite().all()) for p in net.parameters())
        return changed, scaler.get_scale(), finite, [p.detach().clone() for p in net.parameters()]

    results = on(3, loop)
    for changed, scale, finite, parameters in results:
        assert (changed, scale, finite) == ([True, False, True, True], 4.0, True)
        assert all(torch.equal(a, b) for a, b in zip(parameters, results[0][3], strict=True))
