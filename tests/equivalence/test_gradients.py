"""Gradients as loops use them: kept, changed, differentiated again, and of every kind of parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from runs import assert_equal, on, same_as_one_process, state
from small import AVERAGING, SERVERS, data, model, step
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

from paceline.errors import ConfigError
from paceline.train.job import Job

ENCODED = [
    "all_reduce(codec=powersgd(rank=2))",
    "all_reduce(codec=fp16)",
    "local_sgd(period=2, codec=powersgd(rank=2))",
]
STRATEGIES = ["all_reduce", *AVERAGING, *SERVERS]


def prepared(job: Job, net: Any = None, **settings: Any) -> Any:
    net = model() if net is None else net
    optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    loader: Any = DataLoader(data(), 7, shuffle=True)
    return job.prepare(net, optimizer, loader, batch="global", **settings)


@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_that_the_loop_keeps_do_not_change(to_none: bool) -> None:
    def loop(job: Job) -> Any:
        net, optimizer, loader = prepared(job)
        kept: list[Any] = []
        for x, y in loader:
            optimizer.zero_grad(set_to_none=to_none)
            functional.cross_entropy(net(x), y).backward()
            kept.append([p.grad for p in net.parameters()])
            optimizer.step()
        return kept, [p.grad for p in net.parameters()], state(net)

    same_as_one_process(loop)


def test_a_gradient_from_before_prepare_stays_the_same_object() -> None:
    """A loop that clears gradients in place sees them through what it kept; also after a second prepare."""

    def loop(job: Job) -> Any:
        net = model()
        functional.cross_entropy(net(data()[:4][0]), data()[:4][1]).backward()
        first = [p.grad for p in net.parameters()]
        net, optimizer, loader = prepared(job, net)
        seen = []
        for i, (x, y) in enumerate(loader):
            optimizer.zero_grad(set_to_none=False)
            functional.cross_entropy(net(x), y).backward()
            assert all(p.grad is kept for p, kept in zip(net.parameters(), first, strict=True))
            seen.append([kept.clone() for kept in first if kept is not None])
            optimizer.step()
            if i == 1:
                job.prepare(net, optimizer)
        return seen, state(net)

    same_as_one_process(loop)


def test_ordinary_loops_cost_no_copies() -> None:
    """Gradients lie in the same views of the flat buffer in every step."""

    def loop(job: Job) -> Any:
        net = model()
        optimizer: Any = torch.optim.Adam(net.parameters())
        net, optimizer, loader = job.prepare(net, optimizer, DataLoader(data(), 7))
        views = job.attachments[0].replica.gradient_views
        before = [id(view) for view in views]
        for x, y in loader:
            functional.cross_entropy(net(x), y).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        return before == [id(view) for view in views]

    assert all(on(2, loop))


def test_changes_between_backward_and_step() -> None:
    def loop(job: Job) -> Any:
        net, optimizer, loader = prepared(job)
        norms = []
        for x, y in loader:
            functional.cross_entropy(net(x), y).backward()
            norms.append(float(nn.utils.clip_grad_norm_(net.parameters(), 0.5)))
            for i, p in enumerate(net.parameters()):
                assert p.grad is not None
                if i % 3 == 0:
                    p.grad.mul_(1.5)
                elif i % 3 == 1:
                    p.grad = p.grad.sign() + 0.5 * p.detach()
                else:
                    p.grad.data = p.grad.data * 2
            optimizer.step()
            optimizer.zero_grad()
        return norms, state(net, optimizer)

    same_as_one_process(loop)


def test_gradients_are_differentiated_again() -> None:
    """A penalty on `grad` itself, made by backward(create_graph=True)."""

    def loop(job: Job) -> Any:
        net, optimizer, loader = prepared(job)
        for x, y in loader:
            optimizer.zero_grad()
            functional.cross_entropy(net(x), y).backward(create_graph=True)
            penalty = sum(p.grad.square().sum() for p in net.parameters())
            for p in net.parameters():
                p.grad = None
            (functional.cross_entropy(net(x), y) + 0.3 * penalty).backward()
            optimizer.step()
        return state(net, optimizer)

    same_as_one_process(loop)


def test_a_penalty_on_gradients_of_inputs() -> None:
    def loop(job: Job) -> Any:
        net, optimizer, loader = prepared(job)
        for x, _ in loader:
            optimizer.zero_grad()
            x = x.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
            ((gradient.norm(dim=1) - 1).square().mean() + net(x).mean()).backward()
            optimizer.step()
        return state(net, optimizer)

    same_as_one_process(loop)


class Odd(nn.Module):
    """Complex, 0-dimensional and empty parameters, and buffers that repeat their elements."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(8)
        self.wave = nn.Parameter(torch.randn(6, 3, dtype=torch.complex128))
        self.temperature = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        self.phase = nn.Parameter(torch.tensor(0.5 + 0.2j, dtype=torch.complex128))
        self.nothing = nn.Parameter(torch.empty(0, dtype=torch.float64))
        self.last = nn.Linear(3, 2).double()
        self.register_buffer("ones", torch.ones(1, dtype=torch.float64).expand(3))
        self.register_buffer("turn", torch.tensor([1j, 1.0, -1j], dtype=torch.complex128))
        self.frozen = nn.Parameter(torch.full((3,), 2j, dtype=torch.complex128), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = (x.to(torch.complex128) @ self.wave) * self.phase * self.turn + self.frozen
        y: torch.Tensor = self.last(z.abs() * self.ones) * self.temperature + self.nothing.sum()
        return y


def odd(job: Job, strategy: str) -> Any:
    net, optimizer, loader = prepared(job, Odd(), strategy=strategy)
    for _ in job.epochs(2):
        for x, y in loader:
            optimizer.zero_grad()
            functional.cross_entropy(net(x), y).backward()
            optimizer.step()
    return state(net, optimizer)


def test_odd_parameters_and_buffers() -> None:
    same_as_one_process(lambda job: odd(job, "all_reduce"))


@pytest.mark.parametrize("strategy", [*STRATEGIES[1:], *ENCODED])
def test_odd_parameters_under_every_method(strategy: str) -> None:
    size = len(state(Odd()))
    results = [r[:size] for r in on(3, lambda job: odd(job, strategy))]
    for ours in results:
        for a, b, start in zip(ours, results[0], state(Odd()), strict=True):
            assert torch.equal(a, b)
            assert torch.isfinite(torch.view_as_real(a) if a.is_complex() else a).all()
            assert a.shape == start.shape
    assert not torch.equal(results[0][0], state(Odd())[0])


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("strategy", ["all_reduce", "local_sgd(period=2)"])
def test_gradient_hooks_after_prepare_are_refused_where_gradients_are_sent(strategy: str, size: int) -> None:
    def halve(parameter: Any) -> None:
        parameter.grad.mul_(0.5)

    def loop(job: Job) -> Any:
        net: Any = model()
        net[0].weight.register_post_accumulate_grad_hook(halve)  # gets this rank's gradient
        optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.1)
        net, optimizer, loader = job.prepare(
            net, optimizer, DataLoader(data(), 6), strategy=strategy, batch="global"
        )
        for number, batch in enumerate(loader):
            if number == 1:
                net[0].bias.register_post_accumulate_grad_hook(halve)
            step(net, optimizer, batch)
        job.synchronize()
        return state(net)

    if strategy == "all_reduce" and size == 2:
        with pytest.raises(ConfigError, match=r"0\.bias got a post-accumulate-grad hook after prepare\(\)"):
            on(size, loop)
    else:
        results = on(size, loop)
        assert_equal(results[-1], results[0])
