"""Optimizers of every origin: their steps are seen once, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_equal, on, same_as_one_process, state
from small import AVERAGING, SERVERS, data, model
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

from paceline.errors import CheckpointError, ConfigError
from paceline.train.job import Job


def train(job: Job, net: nn.Module, loader: Any, step: Any, epochs: int = 2) -> None:
    for _ in job.epochs(epochs):
        for x, y in loader:
            for p in net.parameters():
                p.grad = None
            functional.cross_entropy(net(x), y).backward()
            step()


def made_after(job: Job, strategy: str, *, is_late: bool) -> Any:
    net: Any = model()
    optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    loader: Any = DataLoader(data(), 6, shuffle=True)
    if is_late:
        net, loader = job.prepare(net, loader, strategy=strategy, batch="global")
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    else:
        net, optimizer, loader = job.prepare(net, optimizer, loader, strategy=strategy, batch="global")
    train(job, net, loader, optimizer.step)
    return state(net), job.stats()["minibatches"], len(job.attachments[0].replica.optimizers)


@pytest.mark.parametrize("strategy", ["all_reduce", *AVERAGING, *SERVERS])
def test_an_optimizer_made_after_prepare_is_found(strategy: str) -> None:
    early = on(3, lambda job: made_after(job, strategy, is_late=False))
    late = on(3, lambda job: made_after(job, strategy, is_late=True))
    for a, b in zip(early, late, strict=True):
        assert a[1:] == b[1:]
        assert all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True))


def test_it_equals_one_process() -> None:
    same_as_one_process(lambda job: made_after(job, "all_reduce", is_late=True)[:2])


@pytest.mark.parametrize("strategy", ["all_reduce", "local_sgd"])
def test_a_second_optimizer_that_was_not_given_is_refused(strategy: str) -> None:
    def loop(job: Job) -> None:
        net: Any = model()
        first: Any = torch.optim.SGD(net[0].parameters(), lr=0.1)
        second = torch.optim.Adam(net[2].parameters(), lr=0.1)
        net, first, loader = job.prepare(net, first, DataLoader(data(), 6), strategy=strategy)
        train(job, net, loader, lambda: (first.step(), second.step()))

    with pytest.raises(ConfigError, match=r"Adam that prepare\(\) was not given .*\[first, second\]"):
        on(2, loop)


@pytest.mark.parametrize("change", ["replace", "add", "unfreeze"])
def test_parameters_that_prepare_did_not_see_are_refused(change: str) -> None:
    def loop(job: Job) -> None:
        net: Any = model()
        net[2].bias.requires_grad_(False)
        optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.1)
        net, optimizer, loader = job.prepare(net, optimizer, DataLoader(data(), 6))
        if change == "replace":
            net[0] = nn.Linear(6, 7, dtype=torch.float64)
            optimizer.param_groups[0]["params"][:2] = list(net[0].parameters())
        elif change == "add":
            optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
        else:
            net[2].bias.requires_grad_(True)
        train(job, net, loader, optimizer.step)

    with pytest.raises(ConfigError, match=r"prepare\(\) did not see: .*job\.prepare\(model, optimizer"):
        on(2, loop)


class Doubled(torch.optim.SGD):
    """A subclass that calls its parent's step, which torch hooks as well once a plain SGD exists."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Lookahead(torch.optim.Optimizer):
    """As many write it: an optimizer around another, without the constructor of Optimizer."""

    def __init__(self, inner: torch.optim.Optimizer, k: int = 2) -> None:
        self.inner, self.k, self.count = inner, k, 0
        self.param_groups, self.state, self.defaults = inner.param_groups, inner.state, inner.defaults
        self.slow = [p.detach().clone() for g in self.param_groups for p in g["params"]]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step()
        self.count += 1
        if self.count % self.k == 0:
            with torch.no_grad():
                for slow, p in zip(
                    self.slow, (p for g in self.param_groups for p in g["params"]), strict=True
                ):
                    slow.lerp_(p, 0.5)
                    p.copy_(slow)


@pytest.mark.parametrize("kind", ["subclass", "wrapper", "wrapper's own"])
def test_nested_steps_count_once(kind: str) -> None:
    def loop(job: Job) -> Any:
        net: Any = model()
        plain = torch.optim.SGD(net.parameters(), lr=0.1)
        optimizer: Any = Doubled(net.parameters(), lr=0.1) if kind == "subclass" else Lookahead(plain)
        given = plain if kind == "wrapper's own" else optimizer
        loader: Any = DataLoader(data(), 6, shuffle=True)
        net, given, loader = job.prepare(net, given, loader, batch="global")
        train(job, net, loader, optimizer.step)
        return state(net), job.stats()["minibatches"], job.step

    same_as_one_process(loop)


@pytest.mark.parametrize("has_loader", [False, True])
def test_two_backward_passes_with_one_step_are_one_minibatch(has_loader: bool) -> None:
    """SAM: up the gradient, a second gradient there, back, and a step."""

    def loop(job: Job) -> Any:
        net: Any = model()
        optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        loader: Any = DataLoader(data(), 6, shuffle=True)
        x, y = data(36).tensors
        batches: Any = [(x[job.rank :: job.size], y[job.rank :: job.size])] * 5
        if has_loader:
            net, optimizer, batches = job.prepare(net, optimizer, loader, batch="global")
        else:
            net, optimizer = job.prepare(net, optimizer)
        for x, y in batches:
            functional.cross_entropy(net(x), y).backward()
            moves = [0.05 * p.grad / p.grad.norm() for p in net.parameters()]
            with torch.no_grad():
                for p, move in zip(net.parameters(), moves, strict=True):
                    p.add_(move)
            optimizer.zero_grad()
            functional.cross_entropy(net(x), y).backward()
            with torch.no_grad():
                for p, move in zip(net.parameters(), moves, strict=True):
                    p.sub_(move)
            optimizer.step()
            optimizer.zero_grad()
        assert job.stats()["minibatches"] == (7 if has_loader else 5)
        return state(net, optimizer), job.step

    same_as_one_process(loop)


@pytest.mark.parametrize("registers", ["before prepare", "after prepare"])
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("window", [1, 3])
def test_a_step_inside_backward_is_refused(window: int, layer: int, registers: str) -> None:
    """At once, not in the last micro-batch of a window, which alone sends its gradients."""
    passes: list[int] = []

    def hooked(net: Any, optimizer: Any) -> None:
        net[layer].weight.register_post_accumulate_grad_hook(lambda p: optimizer.step())

    def loop(job: Job) -> None:
        net: Any = model()
        optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.1)
        if registers == "before prepare":
            hooked(net, optimizer)
        net, optimizer, loader = job.prepare(net, optimizer, DataLoader(data(), 6), accumulation_steps=window)
        if registers == "after prepare":
            hooked(net, optimizer)
        net.register_forward_hook(lambda *_: passes.append(job.rank))
        train(job, net, loader, lambda: None)

    with pytest.raises(ConfigError, match=r"step\(\) inside backward|step\(\), after backward"):
        on(2, loop)
    assert max(map(passes.count, (0, 1))) == 1


@pytest.mark.parametrize("kind", ["mean", "number", "sum", "normalised"])
def test_lbfgs_decides_by_the_loss_of_all_ranks(kind: str) -> None:
    """It stops, and searches along a line, by the losses that its closure returns."""

    def loop(job: Job) -> Any:
        net: Any = model()
        if kind == "normalised":
            net.insert(1, nn.BatchNorm1d(7, dtype=torch.float64))
        optimizer: Any = torch.optim.LBFGS(net.parameters(), max_iter=3, line_search_fn="strong_wolfe")
        options: Any = (
            {"loss_reduction": "sum"} if kind == "sum" else {"sync_batch_norm": kind == "normalised"}
        )
        loader: Any = DataLoader(data(22), 8)
        losses = []
        net, optimizer, loader = job.prepare(net, optimizer, loader, batch="global", **options)
        for _ in job.epochs(1):
            for x, y in loader:

                def closure(x: Any = x, y: Any = y) -> Any:
                    optimizer.zero_grad()
                    reduction = "sum" if kind == "sum" else "mean"
                    loss = functional.cross_entropy(net(x), y, reduction=reduction)
                    loss.backward()
                    return loss.item() if kind == "number" else loss

                losses.append(float(optimizer.step(closure)))
        return losses, state(net), job.stats()["minibatches"]

    same_as_one_process(loop, tolerance=1e-7)


def with_two_loaders(job: Job, saved: Path | None) -> Any:
    """Prepared, and loaded from a checkpoint if it is there."""
    net: Any = model()
    optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    loaders: Any = DataLoader(data(10), 4, shuffle=True), DataLoader(data(14), 4, shuffle=True)
    net, optimizer, *loaders = job.prepare(net, optimizer, *loaders, batch="global")
    if saved is not None and saved.exists():
        job.load(saved)
    return net, optimizer, loaders


@pytest.mark.parametrize("where", [("a", 1, 1), ("b", 0, 1), ("b", 2, 3), ("a", 3, 2)])
def test_a_checkpoint_amid_an_epoch_of_several_passes(tmp_path: Path, where: tuple[str, int, int]) -> None:
    """Passes that are over are not trained again: of one loader after the other, or of one several times."""

    def train(job: Job, *, stops: bool) -> Any:
        net, optimizer, loaders = with_two_loaders(job, None if stops else tmp_path / "saved")
        for _ in job.epochs(2):
            for name, loader in zip("ab", loaders, strict=True):
                for _ in range(2):
                    for x, y in loader:
                        functional.cross_entropy(net(x), y).backward()
                        optimizer.step()
                        optimizer.zero_grad()
                        if stops and (name, loader.epoch, loader.step) == where:
                            job.save(tmp_path / "saved")
                            return None
        return state(net, optimizer), job.step, [loader.epoch for loader in loaders]

    expected = on(1, lambda job: train(job, stops=False))[0]
    on(2, lambda job: train(job, stops=True))
    assert (tmp_path / "saved").exists()
    for resumed in on(2, lambda job: train(job, stops=False)):
        assert_equal(resumed, expected)


def test_a_checkpoint_between_the_passes_of_an_epoch(tmp_path: Path) -> None:
    """From the second epoch on it is known that the other loader is still to come."""

    def train(job: Job, *, stops: bool) -> Any:
        net, optimizer, loaders = with_two_loaders(job, None if stops else tmp_path / "saved")
        for epoch in job.epochs(3):
            for loader in loaders:
                for x, y in loader:
                    functional.cross_entropy(net(x), y).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                if stops and epoch == 1:
                    job.save(tmp_path / "saved")
                    return None
        return state(net, optimizer), job.step

    expected = on(1, lambda job: train(job, stops=False))[0]
    on(2, lambda job: train(job, stops=True))
    for resumed in on(2, lambda job: train(job, stops=False)):
        assert_equal(resumed, expected)


@pytest.mark.parametrize(
    ("inner", "stop_at"), [("passes", n) for n in range(1, 7)] + [("iterator", n) for n in (1, 2, 4, 5)]
)
def test_a_checkpoint_amid_passes_inside_a_pass(tmp_path: Path, inner: str, stop_at: int) -> None:
    """An inner pass for each batch of the outer one, or an iterator beside it: each goes on where it was."""

    def train(job: Job, *, stops: bool) -> Any:
        net, optimizer, (outer, other) = with_two_loaders(job, None if stops else tmp_path / "saved")
        count = 0
        for _ in job.epochs(2):
            beside = iter(other)
            for batch in outer:
                insides = other if inner == "passes" else [next(beside)]
                for x, y in (batch, *insides):
                    functional.cross_entropy(net(x), y).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                count += 1
                if stops and count == stop_at:
                    job.save(tmp_path / "saved")
                    return None
        return state(net, optimizer), job.step

    expected = on(1, lambda job: train(job, stops=False))[0]
    on(2, lambda job: train(job, stops=True))
    assert (tmp_path / "saved").exists()
    for resumed in on(2, lambda job: train(job, stops=False)):
        assert_equal(resumed, expected)


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize("strategy", ["all_reduce", "local_sgd(period=2)"])
def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path: Path, strategy: str, is_late: bool) -> None:
    def loop(job: Job, kind: Any) -> None:
        net: Any = model()
        if kind is torch.optim.SGD:
            job.prepare(net, kind(net.parameters(), lr=0.1), strategy=strategy)
            job.save(tmp_path / "saved")
        elif is_late:
            job.prepare(net, strategy=strategy)
            job.load(tmp_path / "saved")
            optimizer = kind(net.parameters(), lr=0.1)
            net(data().tensors[0]).sum().backward()
            optimizer.step()
        else:
            job.prepare(net, kind(net.parameters(), lr=0.1), strategy=strategy)
            job.load(tmp_path / "saved")

    on(2, lambda job: loop(job, torch.optim.SGD))
    with pytest.raises(CheckpointError, match="saved with the optimizers SGD, this job has AdamW"):
        on(2, lambda job: loop(job, torch.optim.AdamW))
