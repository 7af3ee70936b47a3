"""Loops that fetch batches before they train them, or leave some out: as one process, or refused."""

from __future__ import annotations

import itertools
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))

from runs import assert_equal, on

from paceline.errors import ConfigError
from paceline.train.job import Job

Fetch = Callable[[Any], Iterator[Any]]


def ahead(loader: Any) -> Iterator[Any]:
    batches = iter(loader)
    batch = next(batches, None)
    while batch is not None:
        following = next(batches, None)
        yield batch
        batch = following


def all_first(loader: Any) -> Iterator[Any]:
    yield from list(loader)


def in_pairs(loader: Any) -> Iterator[Any]:
    batches = iter(loader)
    while pair := list(itertools.islice(batches, 2)):
        yield from pair


def by_a_thread(loader: Any) -> Iterator[Any]:
    fetched: queue.Queue[Any] = queue.Queue(maxsize=2)

    def fetch() -> None:
        for batch in loader:
            fetched.put(batch)
        fetched.put(None)

    thread = threading.Thread(target=fetch)
    thread.start()
    while (batch := fetched.get()) is not None:
        yield batch
    thread.join()


def views(loader: Any) -> Iterator[Any]:
    for x, y in ahead(loader):
        yield x.view(len(x), -1), y


def model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def samples() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(22, 4, generator=generator, dtype=torch.float64)
    return TensorDataset(x, x[:, :3].argmax(1))


def train(net: Any, optimizer: Any, batches: Iterator[Any]) -> None:
    for x, y in batches:
        optimizer.zero_grad()
        functional.cross_entropy(net(x), y).backward()
        optimizer.step()


def plainly(fetch: Fetch) -> list[Any]:
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9)
    for _ in range(2):
        train(net, optimizer, fetch(DataLoader(samples(), 4)))
    return [p.detach() for p in net.parameters()]


def prepared(job: Job, **settings: Any) -> Any:
    net: Any = model()
    optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9)
    return job.prepare(net, optimizer, DataLoader(samples(), 4), batch="global", **settings)


@pytest.mark.parametrize("fetch", [ahead, all_first, in_pairs, views])
def test_batches_fetched_ahead_keep_their_weights(fetch: Fetch) -> None:
    """The last batch has two samples: of three ranks, one repeats a batch that counts nothing."""

    def loop(job: Job) -> Any:
        net, optimizer, loader = prepared(job)
        for _ in job.epochs(2):
            train(net, optimizer, fetch(loader))
        return [job.step, job.samples, loader.epoch], [p.detach() for p in net.parameters()]

    expected = plainly(fetch)
    for size in (1, 2, 3):
        for counts, parameters in on(size, loop):
            assert counts == [12, 44, 2]
            assert_equal(parameters, expected, tolerance=1e-9)


def test_batches_fetched_by_a_thread_keep_their_weights() -> None:
    """In one process: which thread of a simulation belongs to which rank is not known to others."""

    def loop(job: Job) -> Any:
        net, optimizer, loader = prepared(job)
        for _ in job.epochs(2):
            train(net, optimizer, by_a_thread(loader))
        return [p.detach() for p in net.parameters()]

    assert_equal(on(1, loop)[0], plainly(ahead), tolerance=1e-9)


def test_copies_of_batches_fetched_ahead_are_refused_where_it_matters() -> None:
    def loop(job: Job) -> None:
        net, optimizer, loader = prepared(job)
        train(net, optimizer, ((x * 1.0, y) for x, y in ahead(loader)))

    with pytest.raises(ConfigError, match=r"2 batches were fetched.*say job\.skip\(\)"):
        on(2, loop)


@pytest.mark.parametrize("fetched", [iter, ahead, all_first], ids=["one", "ahead", "all"])
@pytest.mark.parametrize("told", [False, True])
def test_batches_that_are_left_out(told: bool, fetched: Fetch) -> None:
    """Known by the tensors that the model gets; for copies of them, the loop says so."""
    is_copied = told and fetched is iter

    def loop(job: Job) -> Any:
        net, optimizer, loader = prepared(job)

        def chosen() -> Iterator[Any]:
            for i, (x, y) in enumerate(fetched(loader)):
                if i % 2 == 0 and i:
                    if told:
                        job.skip()
                    continue
                yield (x * 1.0 if is_copied else x), y

        train(net, optimizer, chosen())
        return [p.detach() for p in net.parameters()]

    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9)
    train(net, optimizer, (b for i, b in enumerate(DataLoader(samples(), 4)) if not (i and i % 2 == 0)))
    for size in (2, 3):
        for parameters in on(size, loop):
            assert_equal(parameters, [p.detach() for p in net.parameters()], tolerance=1e-9)


def test_a_look_at_a_batch_after_a_pass_whose_last_step_is_still_open() -> None:
    """LBFGS: a minibatch ends when the next batch begins, and that one was only looked at, by one rank."""

    def loop(job: Job) -> Any:
        net: Any = model()
        optimizer: Any = torch.optim.LBFGS(net.parameters(), lr=0.01, max_iter=2)
        net, optimizer, loader = job.prepare(net, optimizer, DataLoader(samples(), 4), batch="global")
        for _ in job.epochs(3):
            if 0 < job.rank == job.size - 1:
                next(iter(loader))
            for x, y in ahead(loader):

                def closure(x: Any = x, y: Any = y) -> Any:
                    optimizer.zero_grad()
                    loss = functional.cross_entropy(net(x), y)
                    loss.backward()
                    return loss

                optimizer.step(closure)
        return job.step, job.samples, loader.epoch

    for size in (1, 2, 3):
        assert on(size, loop) == [(18, 66, 3)] * size


class Slices(Dataset):
    """Ready-made batches that are parts of one tensor, with a mask that all share."""

    def __init__(self) -> None:
        self.x, self.y = samples().tensors
        self.mask = torch.ones(4, dtype=torch.float64)

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> Any:
        return self.x[4 * i : 4 * i + 4], self.y[4 * i : 4 * i + 4], self.mask


@pytest.mark.parametrize("fetch", [ahead, all_first, None])
def test_batches_that_are_parts_of_one_tensor(fetch: Fetch | None) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model()

        def forward(self, x: Any, mask: Any) -> Any:
            return self.inner(x * mask)

    def loop(job: Job) -> Any:
        torch.manual_seed(3)
        net: Any = Masked()
        optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.3)
        mine = Subset(Slices(), range(job.rank, 6, job.size))
        loader: Any = DataLoader(mine, batch_size=None)
        net, optimizer, loader = job.prepare(
            net, optimizer, loader, shard=False, batch_size_of=lambda batch: len(batch[0])
        )
        left_out = fetch is None
        for i, (x, y, mask) in enumerate(loader if fetch is None else fetch(loader)):
            if left_out and i == 0:
                continue
            optimizer.zero_grad()
            functional.cross_entropy(net(x, mask), y).backward()
            optimizer.step()
        return [p.detach() for p in net.parameters()]

    def plainly(size: int) -> Any:
        net = Masked()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
        batches = [Slices()[i] for i in range(6)]
        for i in range(size if fetch is None else 0, 6, size):
            optimizer.zero_grad()
            x, y = (torch.cat([b[k] for b in batches[i : i + size]]) for k in (0, 1))
            functional.cross_entropy(net.inner(x), y).backward()
            optimizer.step()
        return [p.detach() for p in net.parameters()]

    for size in (1, 2, 3):
        for parameters in on(size, loop):
            assert_equal(parameters, plainly(size), tolerance=1e-9)


def test_a_model_that_is_called_in_parts_learns_each_batch() -> None:
    def loop(job: Job) -> Any:
        net, optimizer, loader = prepared(job)
        for x, y in loader:
            optimizer.zero_grad()
            functional.cross_entropy(net[2](net[1](net[0](x * 1.0))), y).backward()
            optimizer.step()
        return [p.detach() for p in net.parameters()]

    net = model()
    train(net, torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9), iter(DataLoader(samples(), 4)))
    for size in (2, 3):
        for parameters in on(size, loop):
            assert_equal(parameters, [p.detach() for p in net.parameters()], tolerance=1e-9)


def test_accumulation_over_batches_fetched_ahead_is_refused_before_the_last() -> None:
    def loop(job: Job) -> None:
        net, optimizer, loader = prepared(job, accumulation_steps=2)
        for x, y in all_first(loader):
            with job.accumulate(net):
                job.backward(functional.cross_entropy(net(x), y))
                optimizer.step()
                optimizer.zero_grad()

    with pytest.raises(ConfigError, match=r"which one is in job\.accumulate"):
        on(2, loop)


def test_values_gathered_after_the_next_batch_was_fetched() -> None:
    """By their own tensors; without any, a model's outputs alone are refused where it matters."""

    def loop(job: Job, keeps: bool) -> Any:
        net, _, loader = prepared(job)
        net.eval()
        loader.is_gathered = True
        found, before = [], None
        with torch.no_grad():
            for x, y in loader:
                if before is not None:
                    found.append(job.gather_for_metrics(before))
                before = (net(x), y) if keeps else net(x)
            return [*found, job.gather_for_metrics(before)]

    with torch.no_grad():
        expected = [(model()(x), y) for x, y in DataLoader(samples(), 4)]
    for size in (1, 2, 3):
        for found in on(size, lambda job: loop(job, True)):
            assert_equal(found, expected, tolerance=1e-9)
    with pytest.raises(ConfigError, match=r"which one is gathered|outside a pass"):
        on(3, lambda job: loop(job, False))


def test_parts_of_one_tensor_are_not_remembered_for_ever() -> None:
    def loop(job: Job) -> int:
        net: Any = model()
        optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.1)
        loader: Any = DataLoader(Slices(), batch_size=None)
        net, optimizer, loader = job.prepare(
            net, optimizer, loader, shard=False, batch_size_of=lambda batch: len(batch[0])
        )
        for _ in range(5):
            for x, y, _mask in loader:
                functional.cross_entropy(net(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
        known = job.loaders.hands._known
        return len({b.number for extents in known._by_storage.values() for b in extents.values()})

    assert all(count <= 6 for count in on(2, loop)), "as many as there are parts"
