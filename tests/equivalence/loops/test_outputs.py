"""The weight of a backward pass whose outputs tell late or nothing: objects, penalties, SyncBatchNorm."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from runs import assert_equal, on
from two_loaders import Training, held_against_one_process, network, samples

from paceline.errors import ConfigError
from paceline.train.job import Job


class Opaque(nn.Module):
    """Its outputs are in an object that nobody but the loop can open."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: torch.Tensor) -> Any:
        return Opened(self.inner(x))


@dataclass
class Opened:
    logits: torch.Tensor


def test_outputs_that_tell_nothing_are_refused_where_it_matters() -> None:
    def train(job: Job, *, side_by_side: bool) -> Any:
        net: Any = Opaque()
        optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.3)
        loaders: Any = DataLoader(samples(23, 1), 6), DataLoader(samples(17, 2), 4)
        net, optimizer, *loaders = job.prepare(net, optimizer, *loaders, batch="global")
        for one, other in zip(*loaders, strict=False):
            losses = []
            for x, y in (one, other):
                losses.append(functional.cross_entropy(net(x).logits, y))
                if not side_by_side:
                    losses.pop().backward()
            for loss in losses:
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach() for p in net.parameters()]

    for size in (2, 3):
        expected = on(1, lambda job: train(job, side_by_side=True))[0]
        for parameters in on(size, lambda job: train(job, side_by_side=False)):
            assert_equal(parameters, expected, tolerance=1e-9)
        with pytest.raises(ConfigError, match=r"they count differently.*job\.weight"):
            on(size, lambda job: train(job, side_by_side=True))


def test_synchronised_statistics_have_the_weight_of_their_batch_in_backward() -> None:
    def train(job: Job) -> Any:
        torch.manual_seed(3)
        net: Any = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
        optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.3)
        loaders: Any = DataLoader(samples(20, 1), 5), DataLoader(samples(12, 2), 3)
        settings: Any = {"batch": "global", "sync_batch_norm": True}
        net, optimizer, *loaders = job.prepare(net, optimizer, *loaders, **settings)
        for (x, y), (other, _) in zip(*loaders, strict=True):
            loss = functional.cross_entropy(net(x), y)
            with torch.no_grad():
                net(other)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach() for p in net.parameters()]

    expected = on(1, train)[0]
    for size in (2, 3):
        for parameters in on(size, train):
            assert_equal(parameters, expected, tolerance=1e-9)


def test_penalties_made_before_either_backward_are_refused_where_it_matters() -> None:
    def penalty(t: Training, batch: Any) -> Any:
        x = batch[0].requires_grad_()
        (slope,) = torch.autograd.grad(t.net(x).sum(), x, create_graph=True)
        return slope.square().mean()

    def one_after_the_other(t: Training) -> None:
        for one, other in zip(t.first, t.second, strict=False):
            for batch in (one, other):
                t.end(penalty(t, batch))

    def both_before(t: Training) -> None:
        for one, other in zip(t.first, t.second, strict=False):
            t.end(penalty(t, one), penalty(t, other))

    held_against_one_process(one_after_the_other, 2)
    with pytest.raises(ConfigError, match="they count differently"):
        held_against_one_process(both_before, 2)
