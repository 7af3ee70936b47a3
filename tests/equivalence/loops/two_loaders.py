"""A model with two loaders whose last batches are short: shares are unequal, of three ranks one has none."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))

from runs import assert_equal, on

from paceline.train.job import Job


def samples(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    return TensorDataset(x, x[:, :3].argmax(1))


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


@dataclass
class Training:
    """What a loop has, prepared or plain."""

    net: Any
    optimizer: Any
    first: Any
    second: Any
    weight: Callable[[int], object] = lambda _: None

    def loss(self, batch: Any, scale: float = 1.0) -> Any:
        x, y = batch
        return functional.cross_entropy(self.net(x), y) * scale

    def step(self, batch: Any) -> None:
        self.end(self.loss(batch))

    def end(self, *losses: Any) -> None:
        for loss in losses:
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def validate(self) -> None:
        self.net.eval()
        with torch.no_grad():
            for x, _ in self.second:
                self.net(x)
        self.net.train()

    def validate_carelessly(self) -> None:
        for x, _ in self.second:
            self.net(x)


Loop = Callable[[Training], None]


def plain() -> Training:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9)
    return Training(net, optimizer, DataLoader(samples(23, 1), 6), DataLoader(samples(17, 2), 4))


def held_against_one_process(loop: Loop, size: int, **settings: Any) -> None:
    one = plain()
    loop(one)

    def body(job: Job) -> Any:
        mine = plain()
        prepared = job.prepare(mine.net, mine.optimizer, mine.first, mine.second, batch="global", **settings)
        training = Training(*prepared, weight=job.weight)
        loop(training)
        return [p.detach() for p in training.net.parameters()]

    for parameters in on(size, body):
        assert_equal(parameters, [p.detach() for p in one.net.parameters()], tolerance=1e-9)
