"""What a loop decides and counts by itself: evaluation of its own, steps that a rank leaves out, rates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from runs import assert_equal, on, same_as_one_process, state
from small import data, model, step
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

from paceline.errors import ConfigError, Mismatch
from paceline.train.job import Job


def prepared(job: Job, *more: Any, **options: Any) -> tuple[Any, ...]:
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    loader = DataLoader(data(), 6, shuffle=True)  # a batch of one sample is the last
    return tuple(job.prepare(net, optimizer, loader, *more, batch="global", **options))


def wrong(outputs: Any, targets: Any) -> tuple[Any, int]:
    return (outputs.argmax(1) != targets).sum(), len(targets)


@pytest.mark.parametrize("has_gradients", [False, True])
@pytest.mark.parametrize("count", [2, 23])
def test_a_validation_loop_sees_every_sample_once(has_gradients: bool, count: int) -> None:
    """A rank without samples in the last batch gets none, rather than earlier ones again."""
    batch_size = 4 if count > 4 else 1  # the first batch of the smaller set has one sample already

    def loop(job: Job) -> Any:
        net, optimizer, loader, validation = prepared(job, DataLoader(data(count), batch_size))
        means = []
        for _ in job.epochs(2):
            net.train()
            for batch in loader:
                step(net, optimizer, batch)
            net.eval()
            total, seen = 0.0, 0
            with torch.set_grad_enabled(has_gradients):
                for x, y in validation:
                    # With gradients, the first batch may be one to train on in evaluation mode.
                    counts = validation.own_samples if has_gradients and count == 2 else len(y)
                    loss = functional.cross_entropy(net(x), y).item()
                    total, seen = total + loss * counts, seen + counts
            means.append(job.all_reduce_metrics({"loss": (total, seen), "seen": seen}))
        assert means[-1]["seen"] == count
        return means, job.step, job.samples, state(net, optimizer)

    same_as_one_process(loop)


def test_sums_over_training_batches_count_own_samples() -> None:
    def loop(job: Job) -> Any:
        net, optimizer, loader = prepared(job)
        means = []
        for _ in job.epochs(2):
            total, seen = 0.0, 0
            for x, y in loader:
                optimizer.zero_grad()
                loss = functional.cross_entropy(net(x), y)
                loss.backward()
                optimizer.step()
                total, seen = total + loss.item() * loader.own_samples, seen + loader.own_samples
            means.append(job.all_reduce_metrics({"loss": (total, seen), "seen": seen}))
        return means

    same_as_one_process(loop)


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_training_in_evaluation_mode(accumulation_steps: int) -> None:
    """Without `model.train()`, weights, steps and the order of samples are the same."""

    def loop(job: Job, *, evaluates: bool) -> Any:
        net, optimizer, loader = prepared(job, accumulation_steps=accumulation_steps)
        orders = []
        for _ in job.epochs(3):
            net.train(not evaluates)
            for i, (x, y) in enumerate(loader):
                orders.append(job.gather_objects(x[: loader.own_samples, 0].tolist()))
                (functional.cross_entropy(net(x), y) / accumulation_steps).backward()
                if (i + 1) % accumulation_steps == 0 or i + 1 == len(loader):
                    optimizer.step()
                    optimizer.zero_grad()
        order = [[sample for own in batch for sample in own] for batch in orders]
        return order, job.step, job.samples, state(net, optimizer)

    same_as_one_process(lambda job: loop(job, evaluates=True))
    (as_usual,), (in_evaluation,) = (on(1, lambda job, e=e: loop(job, evaluates=e)) for e in (False, True))
    assert as_usual[:3] == in_evaluation[:3]


def test_a_checkpoint_inside_a_validation_does_not_count_it() -> None:
    def loop(job: Job) -> tuple[int, int, int]:
        net, optimizer, loader, validation = prepared(job, DataLoader(data(8), 4))
        for batch in loader:
            step(net, optimizer, batch)
        net.eval()
        for _ in validation:
            saved = job.collect_state()["job"]
        return saved["step"], saved["samples"], job.step

    assert on(2, loop) == [(7, 37, 7)] * 2


def by_its_own_loss(job: Job, kind: str) -> Any:
    net, optimizer, loader = prepared(job)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    for _ in range(3):
        for x, y in loader:
            optimizer.zero_grad()
            loss = functional.cross_entropy(net(x), y)
            loss.backward()
            if kind == "rate" or job.rank == 0 or loss > 0.6:
                optimizer.step()
        plateau.step(1.0 if kind == "rate" and job.rank else 1.0 / job.step)
    return net


@pytest.mark.parametrize("kind", ["step", "rate"])
def test_steps_that_differ_over_the_ranks_are_refused(kind: str) -> None:
    def evaluated(job: Job) -> None:
        job.evaluate(by_its_own_loss(job, kind), data(), {"wrong": wrong})

    def finished(job: Job) -> None:
        by_its_own_loss(job, kind)
        job.synchronize()

    for loop in (evaluated, finished):
        with pytest.raises(Mismatch, match=r"rank 1 took other steps .*learning rates .*all_reduce_metrics"):
            on(2, loop)
        assert on(1, loop) == [None]


def test_a_step_that_the_ranks_leave_out_together_is_fine() -> None:
    def loop(job: Job) -> Any:
        net, optimizer, loader = prepared(job)
        for _ in job.epochs(2):
            for i, (x, y) in enumerate(loader):
                optimizer.zero_grad()
                functional.cross_entropy(net(x), y).backward()
                if i % 3:
                    optimizer.step()
        return job.evaluate(net, data(), {"wrong": wrong}), state(net, optimizer)

    same_as_one_process(loop)


@pytest.mark.parametrize("strategy", ["all_reduce", "local_sgd(period=2)"])
def test_another_dtype_after_prepare_is_refused(strategy: str) -> None:
    def loop(job: Job) -> None:
        net, optimizer, loader = prepared(job, strategy=strategy)
        net.float()
        for x, y in loader:
            functional.cross_entropy(net(x.float()), y).backward()
            optimizer.step()

    with pytest.raises(ConfigError, match=r"float64 on cpu when prepare\(\) saw it .*before prepare\(\)"):
        on(2, loop)


@pytest.mark.parametrize("change", ["assign", "module"])
def test_new_parameters_with_a_new_optimizer_are_refused(change: str) -> None:
    def loop(job: Job) -> None:
        net, optimizer, loader = prepared(job)
        if change == "assign":
            net.load_state_dict({k: v.clone() for k, v in net.state_dict().items()}, assign=True)
        else:
            for i in (0, 2):
                net[i] = nn.Linear(net[i].in_features, net[i].out_features, dtype=torch.float64)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for batch in loader:
            step(net, optimizer, batch)

    with pytest.raises(ConfigError, match=r"prepare\(\) did not see: 0\.weight and 3 more"):
        on(2, loop)


def test_an_optimizer_that_replaces_another_is_prepared_again() -> None:
    def loop(job: Job, *, again: bool) -> Any:
        net, optimizer, loader = prepared(job)
        for epoch in job.epochs(2):
            if epoch == 1:
                optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
                if again:
                    net, optimizer = job.prepare(net, optimizer)
            for batch in loader:
                step(net, optimizer, batch)
        return state(net, optimizer), job.step

    with pytest.raises(ConfigError, match=r"If it replaces another, prepare again"):
        on(2, lambda job: loop(job, again=False))
    same_as_one_process(lambda job: loop(job, again=True))


def test_a_checkpoint_without_a_path_is_refused() -> None:
    def loop(job: Job) -> None:
        prepared(job)
        job.save(job.checkpoint)  # type: ignore[arg-type]

    with pytest.raises(ConfigError, match=r"job\.save\(None\).*--checkpoint"):
        on(2, loop)


def test_a_loader_of_a_closed_job_is_refused() -> None:
    def loop(job: Job) -> None:
        net, optimizer, loader = prepared(job)
        step(net, optimizer, next(iter(loader)))
        job.close()
        for batch in loader:
            step(net, optimizer, batch)

    with pytest.raises(ConfigError, match=r"the job of this loader is closed"):
        on(2, loop)


def drifts_by_its_loss(job: Job, net: Any, number: int) -> None:
    with torch.no_grad():
        net[0].bias.add_(0.1 * job.rank)


def drifts_by_random_numbers(job: Job, net: Any, number: int) -> None:
    with torch.no_grad():
        net[0].weight.add_(torch.randn_like(net[0].weight), alpha=0.1)


@pytest.mark.parametrize("how", [drifts_by_its_loss, drifts_by_random_numbers], ids=lambda f: f.__name__)
@pytest.mark.parametrize("seen_by", ["evaluate", "synchronize"])
def test_replicas_that_a_loop_makes_unequal_are_noticed(how: Any, seen_by: str) -> None:
    def loop(job: Job) -> None:
        net, optimizer, loader = prepared(job)
        for number, batch in enumerate(loader):
            step(net, optimizer, batch)
            how(job, net, number)
        if seen_by == "evaluate":
            job.evaluate(net, data(), {"wrong": wrong})
        else:
            job.synchronize()

    on(1, loop)
    with pytest.raises(Mismatch, match=r"parameters of rank 1 are others .*drifted apart.*job\.set_seed"):
        on(2, loop)


class CodeBook(nn.Module):
    """Entries that follow what passes through, without gradients; and a table that nothing changes."""

    def __init__(self, *, by_data: bool) -> None:
        super().__init__()
        self.by_data = by_data
        self.entries = nn.Parameter(torch.zeros(3, 6, dtype=torch.float64), requires_grad=False)
        self.table = nn.Parameter(torch.rand(5, dtype=torch.float64) / 3, requires_grad=False)
        self.inner = model()

    def forward(self, x: torch.Tensor) -> Any:
        if self.training:
            mean = x.detach().mean(0).expand_as(self.entries)
            (self.entries.data if self.by_data else self.entries).lerp_(mean, 0.3)
        return self.inner(x)


@pytest.mark.parametrize("by_data", [True, False])
@pytest.mark.parametrize("strategy", ["all_reduce", "local_sgd(period=2)", "gossip"])
def test_frozen_parameters_that_change_are_equal_in_the_end(strategy: str, by_data: bool) -> None:
    def loop(job: Job) -> Any:
        net: Any = CodeBook(by_data=by_data)
        optimizer: Any = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
        loader: Any = DataLoader(data(), 6)
        net, optimizer, loader = job.prepare(net, optimizer, loader, strategy=strategy, batch="global")
        table, own = net.table.tolist(), []
        for _ in job.epochs(2):
            for batch in loader:
                step(net, optimizer, batch)
            own = net.entries.tolist()
            job.evaluate(net, data(), {"wrong": wrong})
            assert net.entries.tolist() == own
        assert net.table.tolist() == table  # bit for bit
        return own, net.entries.tolist()

    (first, agreed), (second, same) = on(2, loop)
    assert first != second and agreed == same
    assert_equal(
        agreed,
        [[(a + b) / 2 for a, b in zip(*both, strict=True)] for both in zip(first, second, strict=True)],
    )


@pytest.mark.parametrize("strategy", ["local_sgd(period=1)", "local_sgd(period=2, codec=fp16)"])
def test_what_a_loop_changes_after_the_last_average_is_averaged_too(strategy: str) -> None:
    def loop(job: Job) -> Any:
        net, optimizer, loader = prepared(job, strategy=strategy)
        for _ in job.epochs(1):
            for number, batch in enumerate(loader):
                if number < 6:  # of seven: the last step is followed by an average
                    step(net, optimizer, batch)
            with torch.no_grad():
                net[0].bias.add_(float(job.rank))
        return state(net)

    first, second = on(2, loop)
    assert_equal(first, second, tolerance=0.0)
