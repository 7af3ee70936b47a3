"""An overflow on one rank: all skip the step where gradients are summed, else this rank alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))

from runs import assert_equal, on, state
from small import data, model

from paceline.train.job import Job

CODECS = [
    "threshold(tau=0.001)",
    "int8",
    "error_feedback(codec=onebit)",
    "powersgd(rank=2)",
    "topk(density=0.1)",
]


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("codec", [None, *CODECS])
def test_all_ranks_skip_the_step_and_go_on(codec: str | None, bad: float) -> None:
    def loop(job: Job) -> Any:
        net: Any = model(torch.float32)
        optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.1)
        strategy = "all_reduce" if codec is None else f"all_reduce(codec={codec})"
        net, optimizer = job.prepare(net, optimizer, strategy=strategy)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        x, y = data(36).tensors
        x, y = x[job.rank :: job.size].float(), y[job.rank :: job.size]
        changed = []
        for step in range(4):
            before = [p.detach().clone() for p in net.parameters()]
            loss = functional.cross_entropy(net(x), y)
            if step == 1 and job.rank == 1:
                loss = loss + bad * net[2].weight[0, 0]
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            changed.append(any(not torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True)))
        finite = all(bool(p.isfinite().all()) for p in net.parameters())
        return changed, scaler.get_scale(), finite, [p.detach().clone() for p in net.parameters()]

    results = on(3, loop)
    for changed, scale, finite, parameters in results:
        assert (changed, scale, finite) == ([True, False, True, True], 4.0, True)
        assert all(torch.equal(a, b) for a, b in zip(parameters, results[0][3], strict=True))


METHODS = ["all_reduce", "local_sgd(period=1)", "local_sgd(period=2)", "diloco(period=3)", "gossip"]
PLACES = ["first", "between forward and backward", "last", "last, set to zero"]


def deep() -> Any:
    """Its backward needs the weights that its forward used."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1))


def end(scaler: Any, optimizer: Any, loss: Any, *, overflows: bool, place: str) -> None:
    """What a loop does after the forward pass; gradients are cleared here if `place` is last."""
    scaler.scale(loss * float("inf") if overflows else loss).backward()
    scaler.step(optimizer)
    scaler.update()
    if place.startswith("last"):
        optimizer.zero_grad(set_to_none="zero" not in place)


@pytest.mark.filterwarnings("ignore:strategy")
@pytest.mark.parametrize("has_loader", [True, False, None], ids=["loader", "no loader", "to validate"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("method", METHODS)
def test_minibatches_are_counted_wherever_gradients_are_cleared(
    method: str, place: str, has_loader: bool | None
) -> None:
    """Rank 0 has to skip the steps of two batches, by itself where ranks step by themselves."""

    def loop(job: Job) -> Any:
        net: Any = deep()
        optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.01)
        loader: Any = DataLoader(TensorDataset(torch.randn(32, 4)), 4)
        if has_loader:
            net, optimizer, loader = job.prepare(net, optimizer, loader, strategy=method)
        else:
            net, optimizer = job.prepare(net, optimizer, strategy=method)
        if has_loader is None:
            job.prepare(DataLoader(TensorDataset(torch.ones(8, 4)), 4))
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for number, (x,) in enumerate(loader):
            if place == "first":
                optimizer.zero_grad()
            loss = net(x).square().mean()
            if place == "between forward and backward":
                optimizer.zero_grad()
            end(scaler, optimizer, loss, overflows=job.rank == 0 and number in (1, 2), place=place)
        job.synchronize()
        (attachment,) = job.attachments
        parameters = [p.detach() for p in net.parameters()]
        return attachment.minibatches, number + 1, attachment.num_updates, parameters

    results = on(2, loop)
    for rank, (minibatches, batches, updates, parameters) in enumerate(results):
        assert minibatches == batches
        assert updates == batches - (2 if rank == 0 or method == "all_reduce" else 0)
        assert all(torch.equal(a, b) for a, b in zip(parameters, results[0][3], strict=True))


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_without_a_loader_several_passes_are_one_minibatch(passes: int) -> None:
    def loop(job: Job) -> tuple[int, int]:
        net: Any = deep()
        optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.01)
        net, optimizer = job.prepare(net, optimizer, strategy="local_sgd(period=2)")
        for _ in range(4):
            for _ in range(passes):
                net(torch.randn(3, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        (attachment,) = job.attachments
        return attachment.minibatches, attachment.num_updates

    assert on(2, loop) == [(4, 4), (4, 4)]


@pytest.mark.parametrize("when", ["before forward", "before backward"])
@pytest.mark.parametrize("place", PLACES)
def test_what_the_loop_said_holds_after_a_skipped_step(place: str, when: str) -> None:
    """Without a loader, where the counts of the coming pass may be told before the skipped one is over."""
    counts = [(3, 1), (2, 2), (1, 4), (4, 1)]

    def train(net: Any, optimizer: Any, parts: Any, weight: Any) -> Any:
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for number, batches in enumerate(parts):
            if place == "first":
                optimizer.zero_grad()
            x = torch.cat(batches)
            if when == "before forward":
                weight(len(x))
            loss = net(x).square().mean()
            if place == "between forward and backward":
                optimizer.zero_grad()
            if when == "before backward":
                weight(len(x))
            end(scaler, optimizer, loss, overflows=number == 1, place=place)
        return [p.detach() for p in net.parameters()]

    generator = torch.Generator().manual_seed(0)
    rows = [[torch.randn(n, 4, generator=generator) for n in both] for both in counts]

    def loop(job: Job) -> Any:
        net: Any = deep()
        optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.1)
        net, optimizer = job.prepare(net, optimizer, strategy="all_reduce")
        return train(net, optimizer, [[both[job.rank]] for both in rows], job.weight)

    net = deep()
    expected = train(net, torch.optim.SGD(net.parameters(), lr=0.1), rows, lambda _: None)
    for parameters in on(2, loop):
        assert_equal(parameters, expected, tolerance=1e-6)


@pytest.mark.parametrize("strategy", ["diloco(period=2)", "streaming_diloco(period=2, fragments=2)"])
def test_first_steps_that_one_rank_leaves_out_make_no_other_outer_step(strategy: str) -> None:
    """By default the outer step depends on the kind of the workers' optimizer, which its state tells."""

    def loop(job: Job) -> Any:
        net = model()
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        *_, loader = job.prepare(net, optimizer, DataLoader(data(24), 4), strategy=strategy, batch="global")
        for i, (x, y) in enumerate(loader):
            optimizer.zero_grad()
            overflows = job.rank == 0 and i < 4
            (functional.cross_entropy(net(x), y) * (float("inf") if overflows else 1)).backward()
            if not overflows:
                optimizer.step()
        job.synchronize()
        return state(net)

    for size in (2, 3):
        ours = on(size, loop)
        for one in ours:
            assert_equal(one, ours[0], tolerance=0)


@pytest.mark.parametrize("strategy", ["all_reduce", "local_sgd(period=2)", "diloco(period=3)"])
def test_first_steps_of_an_optimizer_made_afterwards_that_are_left_out(strategy: str) -> None:
    """The minibatches before its first step count, though nobody knew then that there would be one."""

    def loop(job: Job) -> Any:
        net = model()
        net, loader = job.prepare(net, DataLoader(data(24), 4), strategy=strategy, batch="global")
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for i, (x, y) in enumerate(loader):
            optimizer.zero_grad()
            functional.cross_entropy(net(x), y).backward()
            if i > 1 or (job.rank and strategy != "all_reduce"):
                optimizer.step()
        job.synchronize()
        return [a.minibatches for a in job.attachments], job.step, state(net)

    for size in (1, 2, 3):
        ours = on(size, loop)
        assert ours[0][:2] == ([6], 6)
        for one in ours:
            assert_equal(one, ours[0], tolerance=0)


@pytest.mark.parametrize("strategy", ["local_sgd(period=2)", "diloco(period=2)"])
def test_passes_with_a_graph_of_a_rank_without_samples_are_one_minibatch(strategy: str) -> None:
    """Its gradients are zeros, and each pass makes new ones: nobody has cleared them."""

    def loop(job: Job) -> Any:
        net = model()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        *_, loader = job.prepare(net, optimizer, DataLoader(data(6), 1), strategy=strategy, batch="global")
        for i, (x, y) in enumerate(loader):
            functional.cross_entropy(net(x), y).backward(create_graph=True)
            if i % 2:
                optimizer.step()
                optimizer.zero_grad()
        job.synchronize()
        return [a.minibatches for a in job.attachments], state(net)

    for size in (2, 3):
        ours = on(size, loop)
        assert ours[0][0] == [3]
        for one in ours:
            assert_equal(one, ours[0], tolerance=0)
