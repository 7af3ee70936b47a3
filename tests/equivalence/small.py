"""A small model, its data and one step, for loops that are written out."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

AVERAGING = ["local_sgd(period=2)", "diloco(period=3)", "bmuf(period=2)", "slowmo(period=2)"]
SERVERS = ["parameter_server", "gossip(mode=synchronous)", "decentralized_threshold(tau=0.01)"]


def data(count: int = 37) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 6, generator=generator, dtype=torch.float64)
    return TensorDataset(x, (x.sum(1) > 0).long())


def model(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 2)).to(dtype)


def step(model: Any, optimizer: Any, batch: Any) -> list[int]:
    """Train one batch; the numbers of its samples, which are the first columns of its inputs."""
    x, y = batch
    optimizer.zero_grad()
    functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    return [int(i) for i in x[:, 0]]
