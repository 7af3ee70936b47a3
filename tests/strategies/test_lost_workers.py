"""Asynchronous training by real processes goes on without workers that die."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import paceline
from paceline.errors import WorkerFailed

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("processes")]

STRATEGIES = [
    "parameter_server(shards=3, staleness=bounded(s=3))",
    "parameter_server(staleness=softsync(c=2)+inverse, prefetch=True)",
    "gossip",
    "decentralized_threshold(tau=0.001)",
]


def end(how: str) -> None:
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exit":
        sys.exit(3)
    raise ValueError("this worker's disk is full")


def gathered(job: Any) -> list[Any]:
    assert job.all_reduce_metrics({"loss": (2.0, 1)}) == {"loss": 2.0}
    found: list[Any] = job.gather_objects({"rank": job.rank})
    return found


def train(
    strategy: str, how: str, victim: int, checkpoint: str = ""
) -> tuple[list[float], float, dict[str, Any]]:
    job = paceline.init(seed=3)
    torch.manual_seed(0)
    model: Any = nn.Linear(8, 3)
    x = torch.randn(180, 8)
    data = torch.utils.data.TensorDataset(x, x[:, :3].argmax(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loader: Any = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)
    model, optimizer, loader = job.prepare(model, optimizer, loader, strategy=strategy)
    if how == "resume":
        return job.load(checkpoint)["names"], 0.0, {}
    accuracy = 0.0
    for epoch in job.epochs(4):
        for step, (inputs, targets) in enumerate(loader):
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
            if (job.rank, epoch, step) == (victim, 1, 7):
                end(how)
        accuracy = job.evaluate(model, data, metrics={"accuracy": correct})["accuracy"]
    if checkpoint:
        job.save(checkpoint, extra={"names": [g["rank"] if g else None for g in gathered(job)]})
    weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()]).tolist()
    stats = job.stats()
    job.close()
    return weights, accuracy, stats


def correct(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[float, int]:
    return float((outputs.argmax(1) == targets).sum()), len(targets)


@pytest.mark.parametrize(
    ("strategy", "fabric"),
    [
        (STRATEGIES[0], "native"),
        pytest.param(STRATEGIES[0], "torch", marks=pytest.mark.slow),
        *(pytest.param(s, "native", marks=pytest.mark.slow) for s in STRATEGIES[1:]),
    ],
)
def test_the_others_finish_when_a_worker_is_killed(strategy: str, fabric: str, tmp_path: Path) -> None:
    checkpoint = str(tmp_path / "checkpoint")
    results = paceline.launch(
        train,
        num_workers=3,
        args=(strategy, "kill", 1, checkpoint),
        fabric=fabric,
        min_workers=2,
        progress=False,
        threads=1,
    )
    assert results[1] is None
    assert results[0][0] == results[2][0]
    assert results[0][1] == results[2][1] > 0.6
    again = paceline.launch(
        train, num_workers=2, args=(strategy, "resume", -1, checkpoint), progress=False, threads=1
    )
    assert again[1][0] == [0, None, 2]


@pytest.mark.parametrize("how", ["raise", pytest.param("exit", marks=pytest.mark.slow)])
def test_a_worker_that_fails_is_lost_too(how: str, capfd: pytest.CaptureFixture[str]) -> None:
    results = paceline.launch(
        train, num_workers=3, args=(STRATEGIES[0], how, 1), min_workers=2, progress=False, threads=1
    )
    assert results[1] is None
    assert results[0][0] == results[2][0]
    said = "".join(capfd.readouterr())
    assert "continuing without rank 1: 2 of 3 workers live" in said
    assert ("this worker's disk is full" in said) == (how == "raise")


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "min_workers"), [(0, 1), (1, 3), (1, None)])
def test_losses_that_end_the_job(victim: int, min_workers: int | None) -> None:
    with pytest.raises(WorkerFailed, match=rf"rank {victim} of 3 .*SIGKILL"):
        paceline.launch(
            train,
            num_workers=3,
            args=(STRATEGIES[0], "kill", victim),
            min_workers=min_workers,
            progress=False,
            threads=1,
        )
