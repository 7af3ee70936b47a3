"""Copies, averages and pickles of prepared models: they hold no job, and change nothing for the original."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from runs import on, same_as_one_process, state
from small import data, model
from torch import nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

from paceline.train.job import Job


def unpickled(net: Any) -> Any:
    return pickle.loads(pickle.dumps(net))


def saved(net: Any) -> Any:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {"deepcopy": copy.deepcopy, "pickle": unpickled, "torch.save": saved}


@pytest.mark.parametrize("precision", [None, "bf16", "fp16"])
@pytest.mark.parametrize("way", list(WAYS))
def test_a_copy_has_its_own_weights_and_no_job(way: str, precision: str | None) -> None:
    def loop(job: Job) -> Any:
        net: Any = model(torch.float32)
        optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.1)
        net, optimizer = job.prepare(net, optimizer, precision=precision)
        x, y = data().tensors
        x = x.float()
        before = net(x).detach()
        twin = WAYS[way](net)
        functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        assert torch.equal(twin(x), before)  # neither the original's weights nor another precision
        assert not torch.equal(net(x), before)
        if job.rank == 0:  # it trains alone, waits for nobody, and scales nothing
            loss = functional.cross_entropy(twin(x), y)
            loss.backward()
            assert 0 < float(twin[0].weight.grad.norm()) < 10
            torch.optim.SGD(twin.parameters(), lr=0.1).step()
        job.barrier()
        return state(net)

    same_as_one_process(loop, tolerance=1e-3)


def test_an_averaged_model() -> None:
    def loop(job: Job) -> Any:
        net: Any = model()
        optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.1)
        loader: Any = DataLoader(data(), 6, shuffle=True)
        net, optimizer, loader = job.prepare(net, optimizer, loader, batch="global")
        average = AveragedModel(net)
        for _ in job.epochs(2):
            for x, y in loader:
                functional.cross_entropy(net(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
                average.update_parameters(net)
        return state(net, average), average(data().tensors[0]).detach()

    same_as_one_process(loop)


class Odd(nn.Module):
    """A complex parameter, and a buffer whose elements share memory."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = nn.Parameter(torch.ones(3, dtype=torch.complex128))
        self.register_buffer("bias", torch.ones(1, dtype=torch.float64).expand(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.phase).real + (x * self.phase).imag + self.bias


def test_the_mean_of_copies_with_complex_parameters_and_expanded_buffers() -> None:
    def loop(job: Job) -> Any:
        job.prepare(nn.Linear(2, 2))
        net = Odd()
        with torch.no_grad():
            net.phase.mul_(job.rank + 2j * job.rank)
            net.bias[0] = float(job.rank)
        rows = TensorDataset(torch.ones(5, 3, dtype=torch.float64), torch.zeros(5))
        metrics = {"mean": lambda out, y: (float(out.sum()), out.numel())}
        found = job.evaluate(net, rows, metrics, average=True)["mean"]
        assert net.phase[0] == job.rank + 2j * job.rank and net.bias[2] == job.rank
        return found

    assert on(3, loop) == [pytest.approx(1 + 2 + 1)] * 3
