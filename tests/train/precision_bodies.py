"""What the ranks run for mixed precision and for loops of one's own."""

from __future__ import annotations

from typing import Any

import bodies
import torch
from torch import nn
from torch.nn import functional

from paceline.errors import ConfigError, Mismatch
from paceline.train.job import Job


def overflow(job: Job, strategy: str, *, clip: bool) -> dict[str, Any]:
    """Nine steps; at the fourth, one rank's loss makes its fp16 gradients infinite."""
    model = bodies.mlp(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model, optimizer = job.prepare(model, optimizer, strategy=strategy, precision="fp16")
    torch.manual_seed(job.rank)
    history, norms, dtypes = [], [], set()
    started = job.stats()["operations"].get("all_reduce", {}).get("calls", 0)
    for step in range(9):
        x, y = torch.randn(8, 6), torch.randint(2, (8,))
        output = model(x)
        dtypes.add(output.dtype)
        loss = functional.cross_entropy(output, y)
        if step == 3 and job.rank == 1:
            loss = loss * 1e30
        loss.backward()
        if clip:
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        before = bodies.flat(model)
        optimizer.step()
        optimizer.zero_grad()
        history.append(before == bodies.flat(model))
    job.synchronize()
    calls = job.stats()["operations"]["all_reduce"]["calls"]
    precision = job.registered["precision"]
    return {
        "unchanged": history,
        "norms": norms,
        "all_reduces": calls - started,
        "digest": bodies.digest(model),
        "minibatches": job.stats()["minibatches"],
        "state": precision.state_dict(),
        "dtypes": [str(d) for d in dtypes],
    }


def near_fp32(job: Job, precision: str) -> float:
    """The largest difference to fp32 after ten steps on the same data."""
    models = []
    for name in ("fp32", precision):
        model = bodies.mlp(torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        job.prepare(model, optimizer, strategy="all_reduce", precision=name)
        torch.manual_seed(job.rank)
        for _ in range(10):
            functional.cross_entropy(model(torch.randn(8, 6)), torch.randint(2, (8,))).backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append(torch.tensor(bodies.flat(model)))
    return float((models[0] - models[1]).abs().max())


def own_loop(job: Job) -> dict[str, Any]:
    """Metrics and objects of people who write their own loops."""
    refused = []
    try:
        job.gather_objects(object())
    except ConfigError as error:
        refused.append(str(error))
    metrics = job.all_reduce_metrics({"loss": (2.0 * job.rank, job.rank), "seen": job.rank + 1})
    try:
        job.all_reduce_metrics({f"of rank {job.rank}": 1})
    except Mismatch as error:
        refused.append(str(error))
    try:
        job.all_reduce_metrics({"empty": (0.0, 0)})
    except ConfigError as error:
        refused.append(str(error))
    gathered = job.gather_objects({"rank": job.rank, "x": torch.arange(job.rank + 1)})
    return {
        "metrics": metrics,
        "refused": refused,
        "ranks": [g["rank"] for g in gathered],
        "sizes": [g["x"].numel() for g in gathered],
    }
