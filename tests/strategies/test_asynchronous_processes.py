"""Asynchronous methods with real processes, on both real fabrics, and their replay in simulation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import paceline

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("processes")]


def train(strategy: str) -> tuple[list[float], dict[str, Any]]:
    job = paceline.init(seed=3)
    torch.manual_seed(0)
    model: Any = nn.Linear(8, 3)
    x = torch.randn(120, 8)
    data = torch.utils.data.TensorDataset(x, x[:, :3].argmax(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loader: Any = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)
    model, optimizer, loader = job.prepare(model, optimizer, loader, strategy=strategy)
    for _ in job.epochs(3):
        for inputs, targets in loader:
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
        job.evaluate(model, data, metrics={"accuracy": correct})
    weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()]).tolist()
    stats = job.stats()
    job.close()
    return weights, stats


def correct(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[float, int]:
    return float((outputs.argmax(1) == targets).sum()), len(targets)


@pytest.mark.parametrize("fabric", ["torch", "native"])
@pytest.mark.parametrize(
    "strategy",
    ["parameter_server(shards=2, staleness=inverse)", "parameter_server(staleness=bounded(s=0))", "gossip"],
)
def test_replicas_agree_after_a_real_run(strategy: str, fabric: str) -> None:
    results = paceline.launch(
        train, num_workers=2, args=(strategy,), fabric=fabric, progress=False, threads=1
    )
    assert results[0][0] == results[1][0]
    if "inverse" in strategy:
        assert results[0][1]["staleness_mean"] == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize(
    "options",
    ["shards=2, staleness=softsync(c=2)+inverse", "staleness=bounded(s=1)", "staleness=fasgd, prefetch=true"],
)
def test_replay_of_three_processes_is_bit_exact(tmp_path: Path, options: str) -> None:
    text = f"parameter_server({options}, {{}}='{{}}')"
    real = paceline.launch(
        train, num_workers=3, args=(text.format("record", tmp_path / "order"),), progress=False, threads=1
    )
    virtual = paceline.simulate(
        train, num_workers=3, args=(text.format("replay", tmp_path / "order"),), compute="exponential"
    )
    assert [w for w, _ in virtual] == [w for w, _ in real]
    assert real[0][1]["staleness_histogram"] == virtual[0][1]["staleness_histogram"]
