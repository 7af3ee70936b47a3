"""The scale of losses stays inside the model: what leaves it is what it would be without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from runs import assert_equal, on, same_as_one_process, state
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from paceline.train.job import Job


def network(seed: int = 3, outputs: int = 6) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, outputs))


def part(job: Job) -> torch.Tensor:
    x = torch.randn(12, 6, generator=torch.Generator().manual_seed(4))
    return x[job.rank :: job.size].clone()


def input_gradient(job: Job, nets: list[Any]) -> Any:
    x = part(job).requires_grad_()
    nets[0](x).square().mean().backward()
    assert x.grad is not None
    everyone: Any = [torch.zeros_like(x) for _ in range(job.size)]
    for rank, one in enumerate(everyone):
        if rank == job.rank:
            one.copy_(x.grad / job.size)
        if job.size > 1:
            job.comm.all_reduce(one).wait()
    return torch.stack(everyone, 1).flatten(0, 1)


def twice(job: Job, nets: list[Any]) -> Any:
    nets[0](nets[0](part(job))).square().mean().backward()


def encoder_and_decoder(job: Job, nets: list[Any]) -> Any:
    nets[1](nets[0](part(job))).square().mean().backward()


def regulariser(job: Job, nets: list[Any]) -> Any:
    net = nets[0]
    (net(part(job)).square().mean() + sum(p.square().sum() for p in net.parameters())).backward()


def two_losses(job: Job, nets: list[Any]) -> Any:
    nets[0](part(job)).square().mean().backward()
    nets[0](part(job)).abs().mean().backward()


def penalty(job: Job, nets: list[Any]) -> Any:
    x = part(job).requires_grad_()
    outputs = nets[0](x)
    (gradient,) = torch.autograd.grad(outputs.square().sum() / 64, x, create_graph=True)
    (outputs.mean() + (gradient.norm(dim=1) * 64 - 1).square().mean()).backward()


def of_parameters(job: Job, nets: list[Any]) -> Any:
    found = torch.autograd.grad(nets[0](part(job)).square().mean() / job.size, list(nets[0].parameters()))
    for one in found:
        if job.size > 1:
            job.comm.all_reduce(one).wait()
    return list(found)


BODIES = [input_gradient, twice, encoder_and_decoder, regulariser, two_losses, penalty, of_parameters]


@pytest.mark.parametrize("body", BODIES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("size", [1, 2])
def test_gradients_are_those_without_a_scale(body: Any, size: int) -> None:
    def loop(job: Job, precision: str) -> Any:
        nets: Any = [network(3), network(5)]
        optimizers: Any = [torch.optim.SGD(n.parameters(), lr=0.1) for n in nets]
        job.prepare(nets, optimizers, precision=precision)
        found = body(job, nets)
        return found, [p.grad.clone() for n in nets for p in n.parameters() if p.grad is not None]

    plain, scaled = on(size, lambda job: loop(job, "fp32")), on(size, lambda job: loop(job, "fp16"))
    assert_equal(scaled, plain, tolerance=5e-3)


def test_two_models_against_each_other() -> None:
    """Each step trains one of the two through the other, as generators and discriminators do."""

    def loop(job: Job) -> Any:
        nets: Any = [network(3), network(5, outputs=1)]
        first, second = (torch.optim.SGD(n.parameters(), lr=0.05) for n in nets)
        job.prepare(nets, [first, second], precision="fp16")
        make, judge = nets
        for _ in range(5):
            x = part(job)
            second.zero_grad()
            made = make(x)
            loss = functional.softplus(-judge(x)).mean() + functional.softplus(judge(made.detach())).mean()
            loss.backward()
            second.step()
            first.zero_grad()
            functional.softplus(-judge(made)).mean().backward()
            first.step()
        return state(*nets)

    same_as_one_process(loop, tolerance=2e-3)


@pytest.mark.parametrize("bad", [{0}, {1}, {0, 1}, set()], ids=str)
@pytest.mark.parametrize("size", [1, 2])
def test_a_minibatch_of_two_passes_is_left_out_if_either_overflows(bad: set[int], size: int) -> None:
    def loop(job: Job) -> None:
        net: Any = network()
        optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.1)
        loader: Any = DataLoader(TensorDataset(torch.randn(8, 6)), batch_size=4)
        net, optimizer, loader = job.prepare(net, optimizer, loader, precision="fp16")
        precision = job.registered["precision"]
        for number, (x,) in enumerate(loader):
            before = [p.detach().clone() for p in net.parameters()]
            for one in (0, 1):
                factor = float("inf") if number == 0 and one in bad else 1.0
                (net(x).square().mean() * factor).backward()
            optimizer.step()
            optimizer.zero_grad()
            moved = [not torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True)]
            assert any(moved) == (number == 1 or not bad)
            assert (precision.skipped, precision.scale) == ((1, 32768.0) if bad else (0, 65536.0))

    on(size, loop)


class Again(nn.Module):
    """One layer under two names, whose weight a second layer has as well."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6, dtype=torch.float64)
        self.again = self.first
        self.tied = nn.Linear(6, 6, dtype=torch.float64)
        self.tied.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.tied(torch.tanh(self.again(torch.tanh(self.first(x)))))
        return out


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_layers_with_two_names_in_float64_are_as_without(precision: str) -> None:
    """Autocast leaves float64 alone, so that nothing at all may differ."""

    def loop(job: Job, precision: str) -> Any:
        torch.manual_seed(1)
        net: Any = Again()
        optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.1)
        net, optimizer = job.prepare(net, optimizer, precision=precision)
        for _ in range(3):
            out = net(part(job).double())
            assert out.dtype == torch.float64
            out.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return state(net), [type(p) for p in net.parameters()]

    for ours, plain in zip(
        on(2, lambda j: loop(j, precision)), on(2, lambda j: loop(j, "fp32")), strict=True
    ):
        assert_equal(ours, plain, tolerance=1e-12)


def test_complex_parameters_are_looked_at_for_overflows() -> None:
    def loop(job: Job) -> Any:
        net: Any = nn.Linear(6, 2, dtype=torch.complex64)
        optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.1)
        net, optimizer = job.prepare(net, optimizer, precision="fp16")
        before = state(net)
        for factor in (float("inf"), 1.0):
            (net(part(job).to(torch.complex64)).abs().mean() * factor).backward()
            optimizer.step()
            optimizer.zero_grad()
            if factor != 1.0:
                assert all(torch.equal(a, b) for a, b in zip(before, state(net), strict=True))
        return job.registered["precision"].skipped

    assert on(2, loop) == [1, 1]
