"""all_reduce(codec=…) through the training API: replicas stay equal, bytes as claimed, state continues."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from paceline.comm import current
from paceline.comm.simulated.simulate import simulate
from paceline.train.job import Job

pytestmark = pytest.mark.distributed

SPECS = [
    "all_reduce",
    "all_reduce(codec=fp16)",
    "all_reduce(codec=int8(stochastic=true))",
    "all_reduce(codec=error_feedback(codec=onebit))",
    "all_reduce(codec=threshold(density=0.05, entropy=true), bucket_mib=0.02)",
    "all_reduce(codec=error_feedback(codec=topk(density=0.1)))",
    "all_reduce(codec=powersgd(rank=4), bucket_mib=0.05)",
]
STEPS = 80


def train(spec: str, steps: int, states: list[Any] | None = None, dtype: Any = torch.float32) -> Any:
    job = Job(current.provided())
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 100), nn.Tanh(), nn.Linear(100, 100), nn.Tanh(), nn.Linear(100, 1))
    model = model.to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03)
    model, optimizer = job.prepare(model, optimizer, strategy=spec)
    if states is not None:
        job.strategy.load_state_dict(states[job.rank])
    losses = []
    for step in range(steps):
        x = torch.randn(16, 30, generator=torch.Generator().manual_seed(100 * step + job.rank)).to(dtype)
        optimizer.zero_grad()
        loss = (model(x) - x[:, :5].sum(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    parameters = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    stats = job.stats()
    claim = job.strategy.traffic(stats["model_bytes"], job.size)
    result = losses, parameters, stats, claim, job.strategy.state_dict()
    job.close()
    return result


@pytest.mark.parametrize("spec", SPECS)
def test_training_with_a_codec(spec: str) -> None:
    for size in (2, 3):
        results = list(simulate(train, args=(spec, STEPS), num_workers=size))
        for _, parameters, *_ in results:
            assert torch.equal(parameters, results[0][1])
        losses, _, stats, claim, _ = results[0]
        assert sum(losses[-5:]) < 0.4 * sum(losses[:5])
        sent = stats["training"]["payload_bytes"] / STEPS
        assert sent <= 1.02 * claim + 1000
        if "codec" in spec:
            assert stats["codec"]["encoded_bytes"] > 0
            assert stats["codec"]["raw_bytes"] >= STEPS * stats["model_bytes"] * 0.99
        if "threshold" not in spec:
            assert sent >= 0.95 * claim


def test_other_dtypes() -> None:
    results = list(simulate(train, args=("all_reduce(codec=int8)", 5, None, torch.float64), num_workers=2))
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][1].dtype == torch.float64


def test_one_worker_sends_nothing() -> None:
    (result,) = simulate(train, args=("all_reduce(codec=onebit)", 3), num_workers=1)
    assert result[2]["payload_bytes"] == 0


def test_the_state_is_the_residuals() -> None:
    spec = "all_reduce(codec=error_feedback(codec=onebit))"
    states = [result[-1] for result in simulate(train, args=(spec, 4), num_workers=2)]
    tensors = [s["residual"] for bucket in states[1]["codec"].values() for s in bucket["worker"]]
    assert any(t.any() for t in tensors)
    again = list(simulate(train, args=(spec, 4, states), num_workers=2))
    fresh = list(simulate(train, args=(spec, 4), num_workers=2))
    assert not torch.equal(again[0][1], fresh[0][1])
