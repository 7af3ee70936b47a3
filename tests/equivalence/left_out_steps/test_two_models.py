"""Two models of equal shapes, of which one rank leaves out a step of one: neither is taken for the other."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))

from runs import assert_equal, on, state
from small import AVERAGING, data, model

from paceline.errors import ConfigError, Mismatch
from paceline.train.job import Job

METHODS = [
    *(one.replace("period=2", "period=1") for one in AVERAGING),
    "local_sgd(period=2)",
    "streaming_diloco(period=2, fragments=2)",
    "streaming_diloco(period=2, fragments=2, codec=topk(density=1.0))",
    "gossip(mode=synchronous)",
    "decentralized_threshold(tau=0.01, dense_steps=3)",
]


def two(job: Job, strategy: str) -> tuple[list[nn.Module], list[Any], Any]:
    """Models that are far apart, their optimizers and a loader."""
    dtype = torch.float32 if "codec" in strategy else torch.float64
    models = [model(dtype), model(dtype)]
    with torch.no_grad():
        for p in models[1].parameters():
            p.add_(1000.0)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in models]
    given = [*models, *optimizers, DataLoader(data(), 6)]
    *_, loader = job.prepare(*given, strategy=strategy, batch="global")
    return models, optimizers, loader


def backward(models: Sequence[nn.Module], batch: Any) -> None:
    x, y = batch
    for m in models:
        functional.cross_entropy(m(x.to(next(m.parameters()).dtype)), y).backward()


@pytest.mark.parametrize("strategy", METHODS)
@pytest.mark.parametrize("left_out", [0, 1])
@pytest.mark.parametrize("zeroes", ["first", "last"])
def test_steps_of_one_model_that_a_rank_leaves_out(strategy: str, left_out: int, zeroes: str) -> None:
    """Its exchange is never that of the other model, and all ranks count the same minibatches."""

    def loop(job: Job) -> Any:
        models, optimizers, loader = two(job, strategy)
        means: dict[str, float] = {}
        for _ in job.epochs(2):
            for i, batch in enumerate(loader):
                if zeroes == "first":
                    [o.zero_grad() for o in optimizers]
                backward(models, batch)
                for which, optimizer in enumerate(optimizers):
                    if not (which == left_out and job.rank == 0 and i in (0, 1, 3)):
                        optimizer.step()
                if zeroes == "last":
                    [o.zero_grad() for o in optimizers]
                if i == 3:
                    means = job.all_reduce_metrics({"ranks": 1})
        weights = [next(m.parameters()).mean().item() for m in models]
        return weights, means, [a.minibatches for a in job.attachments], job.step, state(*models)

    for size in (2, 3):
        ours = on(size, loop)
        for weights, means, minibatches, _, _ in ours:
            assert abs(weights[0]) < 10 and abs(weights[1] - 1000) < 10, (size, weights)
            assert means == {"ranks": size} and minibatches == [14, 14]
        for rank, one in enumerate(ours):
            assert_equal(one[2:], ours[0][2:], tolerance=0, where=f"rank {rank} of {size}: ")


def test_a_scaler_of_torch_leaves_out_the_steps_of_one_model_on_one_rank() -> None:
    def loop(job: Job) -> Any:
        models, optimizers, loader = two(job, "local_sgd(period=1)")
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for _ in job.epochs(2):
            for i, (x, y) in enumerate(loader):
                for which, (m, o) in enumerate(zip(models, optimizers, strict=True)):
                    o.zero_grad()
                    loss = functional.cross_entropy(m(x), y)
                    if (job.rank, which, i % 3) == (1, 0, 0):
                        loss = loss * float("inf")
                    scaler.scale(loss).backward()
                    scaler.step(o)
                scaler.update()
        return [a.minibatches for a in job.attachments], state(*models)

    ours = on(2, loop)
    assert ours[0][0] == [14, 14]
    assert_equal(ours[1], ours[0], tolerance=0)
    assert all(t.isfinite().all() for t in ours[0][1])


@pytest.mark.parametrize("strategy", AVERAGING)
def test_ranks_with_other_numbers_of_batches(strategy: str) -> None:
    """A rank that has finished takes part in the exchanges of both models until the others have."""

    def loop(job: Job) -> Any:
        models, optimizers, _ = two(job, strategy)
        batches = list(DataLoader(data(), 6))
        for batch in batches[: 3 + 2 * job.rank]:
            for m, o in zip(models, optimizers, strict=True):
                o.zero_grad()
                backward([m], batch)
                o.step()
        job.synchronize()
        return [next(m.parameters()).mean().item() for m in models], state(*models)

    for size in (2, 3):
        ours = on(size, loop)
        assert abs(ours[0][0][0]) < 10 and abs(ours[0][0][1] - 1000) < 10
        for one in ours:
            assert_equal(one, ours[0], tolerance=0)


def test_the_order_of_steps_is_learned() -> None:
    """Models that are stepped in another order than they were prepared: a step of the first is left out."""

    def loop(job: Job) -> Any:
        models, optimizers, loader = two(job, "local_sgd(period=1)")
        for i, batch in enumerate(loader):
            backward(models, batch)
            for which in (1, 0):
                if not (job.rank == 0 and which == 1 and i == 3):
                    optimizers[which].step()
            [o.zero_grad() for o in optimizers]
        job.synchronize()
        return [a.minibatches for a in job.attachments], state(*models)

    ours = on(2, loop)
    assert ours[0][0] == [7, 7]
    assert_equal(ours[1], ours[0], tolerance=0)


def test_ranks_that_step_their_models_in_other_orders_are_refused() -> None:
    def loop(job: Job) -> None:
        models, optimizers, loader = two(job, "local_sgd(period=1)")
        for batch in loader:
            backward(models, batch)
            for which in (1, 0) if job.rank == 0 else (0, 1):
                optimizers[which].step()

    with pytest.raises((ConfigError, Mismatch), match="same order"):
        on(2, loop)


def test_a_step_of_one_model_alone_that_others_took_is_named_where_ranks_meet() -> None:
    def loop(job: Job) -> None:
        net = model()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        _, _, loader = job.prepare(net, optimizer, DataLoader(data(), 6), strategy="local_sgd(period=1)")
        for batch in loader:
            backward([net], batch)
            if job.rank == 1:
                optimizer.step()
            job.barrier()

    with pytest.raises(Mismatch, match=r"left out an optimizer\.step"):
        on(2, loop)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("shard", [True, False])
@pytest.mark.parametrize("zeroes", ["first", "between", "last"])
@pytest.mark.parametrize("strategy", ["local_sgd(period=1)", "diloco(period=2)"])
def test_what_loaders_tell_each_other_beside_a_step_that_is_left_out(
    count: int, shard: bool, zeroes: str, strategy: str
) -> None:
    """Samples of each rank, whether the data is the same, and a checkpoint: also after the first batch."""

    def loop(job: Job, folder: str) -> Any:
        models = [model() for _ in range(count)]
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in models]
        source = DataLoader(data(24 + 2 * job.rank if not shard else 24), 6, shuffle=True)
        *_, loader = job.prepare(*models, *optimizers, source, strategy=strategy, batch="global", shard=shard)
        for _ in job.epochs(2):
            for i, (x, y) in enumerate(loader):
                if zeroes == "first":
                    [o.zero_grad() for o in optimizers]
                loss = sum(functional.cross_entropy(m(x), y) for m in models)
                if job.rank == 0 and i in (0, 1):
                    loss = loss * float("nan")
                if zeroes == "between":
                    [o.zero_grad() for o in optimizers]
                loss.backward()
                if not (job.rank == 0 and i in (0, 1)):
                    [o.step() for o in optimizers]
                if zeroes == "last":
                    [o.zero_grad() for o in optimizers]
            job.save(folder)
        return [a.minibatches for a in job.attachments], job.step, state(*models)

    for size in (2, 3):
        with tempfile.TemporaryDirectory() as folder:
            ours = on(size, lambda job, folder=folder: loop(job, folder))
        assert ours[0][0] == [ours[0][1]] * count
        for one in ours:
            assert_equal(one, ours[0], tolerance=0)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("zeroes", ["first", "between", "last"])
def test_batch_norm_over_the_ranks_beside_a_step_that_is_left_out(count: int, zeroes: str) -> None:
    """Its layers make the ranks wait for each other in the next forward pass."""

    def loop(job: Job) -> Any:
        models = [nn.Sequential(nn.BatchNorm1d(6), model()).double() for _ in range(count)]
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in models]
        given = [*models, *optimizers, DataLoader(data(24), 6)]
        *_, loader = job.prepare(*given, strategy="local_sgd(period=1)", sync_batch_norm=True)
        for _ in job.epochs(2):
            for i, (x, y) in enumerate(loader):
                if zeroes == "first":
                    [o.zero_grad() for o in optimizers]
                loss = sum(functional.cross_entropy(m(x), y) for m in models)
                if zeroes == "between":
                    [o.zero_grad() for o in optimizers]
                loss.backward()
                for which, optimizer in enumerate(optimizers):
                    if not (job.rank == 0 and i != 1 and which + 1 == count):
                        optimizer.step()
                if zeroes == "last":
                    [o.zero_grad() for o in optimizers]
        return [a.minibatches for a in job.attachments], job.step, state(*models)

    for size in (2, 3):
        ours = on(size, loop)
        assert ours[0][0] == [ours[0][1]] * count
        for one in ours:
            assert_equal(one, ours[0], tolerance=0)
