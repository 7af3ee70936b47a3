"""SyncBatchNorm of several ranks is BatchNorm of one process: outputs, gradients, running statistics."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from runs import on, same_as_one_process, state
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from paceline.errors import ConfigError
from paceline.train.job import Job

CONVERSIONS = ["torch", "prepare"]
LAYERS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def pictures(dims: int, count: int = 29, mean: float = 3.0) -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(count, 2, *[3] * dims, generator=generator, dtype=torch.float64) + mean
    return TensorDataset(x, (x.flatten(1).sum(1) > x.flatten(1).sum(1).mean()).long())


def network(dims: int, **options: Any) -> nn.Sequential:
    torch.manual_seed(6)
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    return nn.Sequential(
        conv(2, 4, 2),
        LAYERS[dims](4, **options),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 2**dims, 3),
        nn.BatchNorm1d(3, **options),
        nn.Linear(3, 2),
    ).double()


def prepared(job: Job, net: Any, dataset: TensorDataset, batch_size: int, by: str, **settings: Any) -> Any:
    if by == "torch" and job.size > 1:
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    loader: Any = DataLoader(dataset, batch_size, shuffle=True)
    return job.prepare(net, optimizer, loader, batch="global", sync_batch_norm=by == "prepare", **settings)


@pytest.mark.parametrize("by", CONVERSIONS)
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": None},
        {"affine": False},
        {"track_running_stats": False},
        {"eps": 0.1, "momentum": 0.7},
    ],
    ids=str,
)
def test_it_is_that_of_one_process(by: str, dims: int, options: dict[str, Any]) -> None:
    """Batches of 7 and at last 1 over the ranks: parts of different sizes, and ranks without samples."""

    def loop(job: Job) -> Any:
        dataset = pictures(dims, count=30)
        net, optimizer, loader = prepared(job, network(dims, **options), dataset, 7, by)
        seen = []
        for _ in job.epochs(2):
            for x, y in loader:
                optimizer.zero_grad()
                functional.cross_entropy(net(x), y).backward()
                optimizer.step()
            with torch.no_grad():
                net.eval()
                if options.get("track_running_stats", True):
                    seen.append(net(dataset.tensors[0]).clone())
                net.train()
                net(dataset.tensors[0][job.rank :: job.size])  # updates the running statistics
        return state(net, optimizer), seen

    same_as_one_process(loop)


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("kind", ["mean", "sum", "tokens"])
def test_it_counts_each_ranks_share_of_the_loss(window: int, kind: str) -> None:
    """Ranks with samples but no tokens take part in the statistics, and have a gradient from others."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(7)
            self.first, self.norm, self.last = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x.flatten(1))
            return self.last(x + self.norm(x).tanh())

    def loop(job: Job) -> Any:
        dataset = pictures(1, count=32)
        settings = {"loss_reduction": "sum"} if kind == "sum" else {}
        net, optimizer, loader = prepared(
            job, Residual().double(), dataset, 5, "torch", accumulation_steps=window, **settings
        )
        for _ in job.epochs(2):
            for i, (x, y) in enumerate(loader):
                outputs = net(x)
                if kind == "tokens":
                    job.weight(y.sum())
                    losses = functional.cross_entropy(outputs, y, reduction="none")
                    loss = (losses * y).sum() / y.sum()
                else:
                    loss = functional.cross_entropy(outputs, y, reduction=kind) / 3
                (loss / window).backward()
                if (i + 1) % window == 0 or i + 1 == len(loader):
                    optimizer.step()
                    optimizer.zero_grad()
        return state(net, optimizer)

    same_as_one_process(loop, sizes=(2, 3, 4))


def test_a_large_mean_loses_nothing_in_float32() -> None:
    """E[x²] - E[x]² in float32 is wrong by more than the variance at a mean of 10,000."""

    def loop(job: Job) -> Any:
        x = pictures(2, count=32, mean=1e4).tensors[0].float()
        net = job.prepare(nn.BatchNorm2d(2, momentum=1.0), sync_batch_norm=True)
        net(x[job.rank :: job.size])
        return [net.running_mean, net.running_var]

    same_as_one_process(loop, tolerance=1e-3)


def test_copies_and_pickles_are_torchs_own() -> None:
    def loop(job: Job) -> Any:
        net, _, loader = prepared(job, network(2), pictures(2), 7, "prepare")
        twin = copy.deepcopy(net)
        file = io.BytesIO()
        torch.save(net, file)
        file.seek(0)
        read = torch.load(file, weights_only=False)
        assert isinstance(net[1], nn.BatchNorm2d)
        if job.rank == 0:  # alone: they wait for nobody
            for one in (twin, read):
                assert type(one[1]) is nn.BatchNorm2d
                one(next(iter(loader))[0])
        job.barrier()
        return state(twin[0], read[0])

    same_as_one_process(loop)


def test_methods_whose_ranks_do_not_wait_refuse_it() -> None:
    def loop(job: Job) -> None:
        prepared(job, network(1), pictures(1), 7, "torch", strategy="parameter_server")

    with pytest.raises(ConfigError, match=r"use nn\.BatchNorm, or strategy='all_reduce'"):
        on(2, loop)
