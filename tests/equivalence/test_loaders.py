"""The user's loaders: passes, splits and settings are those of one process, or refused."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from runs import on, same_as_one_process, state
from small import step
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    random_split,
)

from paceline.errors import ConfigError
from paceline.train.job import Job

COUNT = 24


def numbers(count: int = COUNT) -> TensorDataset:
    x = torch.arange(count, dtype=torch.float64)
    return TensorDataset(torch.stack([x, (x % 5) / 5], 1), (x % 3).long())


def prepared(job: Job, loader: Any, **options: Any) -> tuple[Any, Any, Any]:
    torch.manual_seed(2)
    model: Any = nn.Linear(2, 3, dtype=torch.float64)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.001)
    return job.prepare(model, optimizer, loader, **{"batch": "global", **options})  # type: ignore[no-any-return]


def all_of(job: Job, seen: list[int]) -> list[int]:
    """The samples of all ranks, sorted."""
    return sorted(i for own in job.gather_objects(seen) for i in own)


LOADERS: dict[str, Callable[[], Any]] = {
    "shuffle": lambda: DataLoader(numbers(), 4, shuffle=True),
    "sampler": lambda: DataLoader(numbers(), 4, sampler=SubsetRandomSampler(range(COUNT))),
    "weighted": lambda: DataLoader(numbers(), 4, sampler=WeightedRandomSampler([1.0] * COUNT, COUNT)),
    "batches": lambda: DataLoader(
        numbers(), batch_sampler=BatchSampler(SubsetRandomSampler(range(COUNT)), 4, drop_last=False)
    ),
    "numpy": lambda: DataLoader(numbers(), 4, sampler=SubsetRandomSampler(np.arange(COUNT))),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("look", ["rank 0", "all"])
def test_a_look_ahead_leaves_the_epochs_as_they_are(kind: str, look: str) -> None:
    def loop(job: Job) -> Any:
        model, optimizer, loader = prepared(job, LOADERS[kind]())
        if look == "all" or job.rank == 0:
            next(iter(loader))
        seen, steps = [], []
        for _ in job.epochs(2):
            own = [i for batch in loader for i in step(model, optimizer, batch)]
            seen.append(all_of(job, own))
            steps.append((job.step, job.samples, loader.epoch))
        return seen, steps, state(model)

    # A batch of 4 goes to two ranks; a third repeats samples that count for nothing.
    same_as_one_process(loop, sizes=(2,) if kind == "batches" else (2, 3))
    seen, steps, _ = on(2, loop)[0]
    assert steps == [(6, COUNT, 1), (12, 2 * COUNT, 2)]
    if kind != "weighted":
        assert seen == [list(range(COUNT))] * 2


def test_a_look_ahead_between_and_inside_epochs() -> None:
    def loop(job: Job) -> Any:
        model, optimizer, loader = prepared(job, LOADERS["shuffle"]())
        seen = []
        for _ in job.epochs(3):
            own: list[int] = []
            for i, batch in enumerate(loader):
                own += step(model, optimizer, batch)
                if i == 2 and job.rank == 0:
                    next(iter(loader))
            seen.append(all_of(job, own))
            if job.rank == 0:
                next(iter(loader))
        return seen, job.step, job.samples, loader.epoch, state(model)

    same_as_one_process(loop)
    assert on(2, loop)[0][:4] == ([list(range(COUNT))] * 3, 18, 3 * COUNT, 3)


def test_a_pass_that_was_left_after_training_is_over() -> None:
    def loop(job: Job) -> Any:
        model, optimizer, loader = prepared(job, LOADERS["shuffle"]())
        seen = []
        for _ in job.epochs(3):
            for batch in loader:
                seen.append(step(model, optimizer, batch))
                break
        return all_of(job, [i for own in seen for i in own]), loader.epoch, loader.step

    same_as_one_process(loop)
    seen, *rest = on(2, loop)[0]
    assert rest == [3, 0] and len(set(seen)) > 6  # three orders, not one


def test_an_iterator_that_was_left_open_does_not_disturb_the_next() -> None:
    def loop(job: Job) -> Any:
        model, optimizer, loader = prepared(job, LOADERS["shuffle"]())
        first = iter(loader)
        own = [step(model, optimizer, next(first)) for _ in range(2)]
        second = [i for batch in loader for i in step(model, optimizer, batch)]
        own += [step(model, optimizer, batch) for batch in first]  # goes on where it was
        third = [i for batch in loader for i in step(model, optimizer, batch)]
        return all_of(job, [i for o in own for i in o]), all_of(job, second), all_of(job, third), state(model)

    same_as_one_process(loop)
    assert on(3, loop)[0][:3] == (list(range(COUNT)),) * 3


def test_nested_passes_are_passes_of_their_own() -> None:
    def loop(job: Job) -> Any:
        model, optimizer, loader = prepared(job, LOADERS["shuffle"]())
        passes = []
        for i, batch in enumerate(loader):
            step(model, optimizer, batch)
            if i % 3 == 0:
                inner = [n for one in loader for n in step(model, optimizer, one)]
                passes.append(all_of(job, inner))
        return passes, loader.epoch, state(model)

    same_as_one_process(loop)
    assert on(2, loop)[0][0] == [list(range(COUNT))] * 2


def test_parallel_iterators_of_one_loader_are_refused() -> None:
    def loop(job: Job) -> None:
        model, optimizer, loader = prepared(job, LOADERS["shuffle"]())
        for one, other in zip(loader, loader, strict=True):
            step(model, optimizer, one)
            step(model, optimizer, other)

    with pytest.raises(ConfigError, match=r"prepare two loaders: first, second = job\.prepare"):
        on(2, loop)


def test_two_prepared_loaders_go_in_parallel() -> None:
    def loop(job: Job) -> Any:
        model, optimizer, loaders = prepared(job, [LOADERS["shuffle"](), LOADERS["shuffle"]()])
        seen: list[list[int]] = [[], []]
        for batches in zip(*loaders, strict=True):
            for own, batch in zip(seen, batches, strict=True):
                own += step(model, optimizer, batch)
        return [all_of(job, own) for own in seen], state(model)

    same_as_one_process(loop)


def test_a_validation_pass_inside_training_is_no_training() -> None:
    def loop(job: Job) -> Any:
        model, optimizer, loader = prepared(job, LOADERS["shuffle"]())
        for _ in job.epochs(2):
            for batch in loader:
                step(model, optimizer, batch)
            model.eval()
            seen = all_of(job, [int(i) for x, _ in loader for i in x[:, 0]])
            model.train()
        return seen, job.step, job.samples, state(model)

    same_as_one_process(loop)
    assert on(2, loop)[0][:3] == (list(range(COUNT)), 12, 2 * COUNT)


def split(job: Job, kind: str) -> Any:
    data = numbers()
    if kind == "random_split":
        return random_split(data, [20, 4])[0]
    order = list(range(COUNT))
    if kind == "random":
        random.shuffle(order)
    elif kind == "numpy":
        np.random.shuffle(order)
    return torch.utils.data.Subset(data, order[:20])


@pytest.mark.parametrize("kind", ["random_split", "random", "numpy"])
def test_splits_before_prepare_are_the_same_on_all_ranks(kind: str) -> None:
    def loop(job: Job) -> Any:
        data = split(job, kind)
        model: Any = nn.Linear(2, 3, dtype=torch.float64)
        drawn = state(model)  # the weights, too
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.001)
        model, optimizer, loader = job.prepare(
            model, optimizer, DataLoader(data, 4, shuffle=True), batch="global"
        )
        own = [i for batch in loader for i in step(model, optimizer, batch)]
        return drawn, list(data.indices), all_of(job, own), state(model)

    same_as_one_process(loop)
    _, indices, seen, _ = on(3, loop)[0]
    assert Counter(seen) == Counter(indices)


def test_after_prepare_each_rank_draws_a_stream_of_its_own() -> None:
    def loop(job: Job) -> Any:
        before = torch.rand(1), np.random.rand(), random.random()
        prepared(job, LOADERS["shuffle"]())
        own = float(torch.rand(1)), np.random.rand(), random.random()
        prepared(job, LOADERS["shuffle"]())
        return [float(one) for one in before], own

    results = on(3, loop)
    assert len({tuple(before) for before, _ in results}) == 1
    assert len({own for _, own in results}) == 3


class Plain(Dataset[int]):
    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> int:
        return index


def nothing(worker: int) -> None:
    """A worker_init_fn."""


def test_a_prepared_loader_has_what_the_users_loader_has() -> None:
    def loop(job: Job) -> Any:
        source: Any = DataLoader(
            Plain(), 4, shuffle=True, num_workers=1, timeout=30, worker_init_fn=nothing, prefetch_factor=3,
            persistent_workers=True, drop_last=True, generator=torch.Generator(),
        )  # fmt: skip
        source.note = "the user's own attribute"
        loader = job.prepare(source, batch="global")
        assert len(loader) == len(source) == 6
        names = "sampler batch_sampler dataset batch_size num_workers drop_last collate_fn pin_memory"
        names += " worker_init_fn generator persistent_workers prefetch_factor timeout note"
        for name in names.split():
            assert getattr(loader, name) is getattr(source, name), name
        assert not hasattr(loader, "no_such_thing")

    on(2, loop)


@pytest.mark.parametrize("is_batched", [False, True])
def test_set_epoch_of_a_distributed_sampler_chooses_the_order(is_batched: bool) -> None:
    def loop(job: Job) -> Any:
        sampler: Any = DistributedSampler(numbers(), num_replicas=job.size, rank=job.rank, shuffle=True)
        source: Any = DataLoader(numbers(), 4, sampler=sampler)
        if is_batched:
            source = DataLoader(numbers(), batch_sampler=BatchSampler(sampler, 4, drop_last=False))
        model, optimizer, loader = prepared(job, source)
        orders = []
        for epoch in (0, 1, 2, 1):
            sampler.set_epoch(epoch)
            rounds = [job.gather_objects(step(model, optimizer, batch)) for batch in loader]
            orders.append([sorted(i for own in parts for i in own) for parts in rounds])
        return orders, state(model)

    same_as_one_process(loop)
    orders, _ = on(2, loop)[0]
    assert orders[1] == orders[3] and orders[0] != orders[1] != orders[2]


def test_set_epoch_of_a_loader_chooses_the_order() -> None:
    def loop(job: Job) -> Any:
        model, optimizer, loader = prepared(job, LOADERS["shuffle"]())
        orders = []
        for epoch in (0, 1, 1):
            loader.set_epoch(epoch)
            rounds = [job.gather_objects(step(model, optimizer, batch)) for batch in loader]
            orders.append([sorted(i for own in parts for i in own) for parts in rounds])
        return orders

    same_as_one_process(loop)
    first, second, third = on(2, loop)[0]
    assert first != second == third


class Own(DistributedSampler[Any]):
    """Gives shares by a rule of its own."""


def test_a_sampler_that_divides_by_its_own_rules_is_refused() -> None:
    def loop(job: Job) -> Any:
        sampler = Own(numbers(), num_replicas=job.size, rank=job.rank)
        return prepared(job, DataLoader(numbers(), 4, sampler=sampler))

    with pytest.raises(ConfigError, match=r"Own gives each rank a share.*shard=False"):
        on(2, loop)


class Endless(Sampler[Any]):
    """Gives indices, or batches of them, for ever."""

    def __init__(self, batch: int = 0) -> None:
        self._batch = batch

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield [3] * self._batch if self._batch else 3


@pytest.mark.parametrize("use", ["train", "evaluate"])
@pytest.mark.parametrize("batch", [0, 1000])
def test_samplers_that_never_end_are_refused(batch: int, use: str) -> None:
    def loop(job: Job) -> None:
        endless = Endless(batch)
        how: Any = {"batch_sampler": endless} if batch else {"sampler": endless}
        source = DataLoader(numbers(), **how)
        if use == "train":
            prepared(job, source)
        else:
            job.evaluate(nn.Identity(), source, {"count": lambda values, targets: (0, 1)})

    with pytest.raises(ConfigError, match=r"sampler Endless has no length.*num_samples"):
        on(2, loop)


class Held(Sampler[Any]):
    """Gives the first numbers of a list, more of them in later epochs."""

    def __init__(self, ids: list[int]) -> None:
        self.ids, self.epoch = ids, 0

    def __len__(self) -> int:
        return len(self.ids[: 8 + 4 * self.epoch])

    def __iter__(self) -> Iterator[int]:
        return iter(self.ids[: 8 + 4 * self.epoch])

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def weighted() -> WeightedRandomSampler:
    generator = torch.Generator().manual_seed(3)
    return WeightedRandomSampler([1.0] * COUNT, 18, generator=generator)


def batched(sampler: Any) -> DataLoader[Any]:
    return DataLoader(numbers(), batch_sampler=BatchSampler(sampler, 4, drop_last=False))


def reweigh(loader: Any) -> None:
    loader.sampler.weights = torch.arange(float(COUNT)) % 3


def reweigh_in_place(loader: Any) -> None:
    loader.batch_sampler.sampler.weights[:12] = 0


def reseed(loader: Any) -> None:
    loader.sampler.generator.manual_seed(8)


def another_list(loader: Any) -> None:
    loader.sampler.ids[2:5] = [20, 21, 22]


CHANGES: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
    "nothing": (lambda: DataLoader(numbers(), 4, sampler=weighted()), lambda loader: None),
    "weights": (lambda: DataLoader(numbers(), 4, sampler=weighted()), reweigh),
    "inner": (lambda: batched(weighted()), reweigh_in_place),
    "generator": (lambda: DataLoader(numbers(), 4, sampler=weighted()), reseed),
    "list": (lambda: DataLoader(numbers(), 4, sampler=Held(list(range(COUNT)))), another_list),
    "epoch": (
        lambda: batched(Held(list(range(COUNT)))),
        lambda loader: loader.batch_sampler.sampler.set_epoch(2),
    ),
    "batch size": (
        lambda: batched(weighted()),
        lambda loader: setattr(loader.batch_sampler, "batch_size", 3),
    ),
}


@pytest.mark.parametrize("looks", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_sampler_may_change_until_its_pass_begins(change: str, looks: bool) -> None:
    source, apply = CHANGES[change]
    plain = source()
    apply(plain)
    lengths, orders = [len(plain)] * 2, [[x[:, 0].tolist() for x, _ in plain] for _ in range(2)]

    def loop(job: Job) -> Any:
        model, optimizer, loader = prepared(job, source())
        if looks and job.rank == 0:
            next(iter(loader))  # the order that it sees is given up
        apply(loader)
        found: list[Any] = []
        known = len(loader)
        for _ in range(2):
            found.append([])
            for x, y in loader:
                found[-1].append(job.gather_for_metrics(x[:, 0]).tolist())
                step(model, optimizer, (x, y))
        return [known, len(loader)], found

    for size in (1, 2, 3):
        for ours in on(size, loop):
            assert ours == (lengths, orders)


def test_the_length_between_passes_is_that_of_the_pass_to_come() -> None:
    def lengths(loaders: list[Any], data: Any, held: Held) -> list[list[int]]:
        found = []
        for epoch in range(3):
            data.indices = list(range(10 + 5 * epoch))
            held.set_epoch(epoch)
            found.append([len(loader) for loader in loaders])
            for loader in loaders:
                taken = iter(loader)
                next(taken)
                found[-1].append(len(loader))
                found[-1].append(1 + sum(1 for _ in taken))
        return found

    def made() -> tuple[list[Any], Any, Held]:
        data, held = Subset(numbers(), list(range(COUNT))), Held(list(range(COUNT)))
        loaders = [
            DataLoader(data, 5),
            DataLoader(data, 5, shuffle=True, drop_last=True),
            DataLoader(numbers(), 5, sampler=held),
            batched(held),
        ]
        return loaders, data, held

    def loop(job: Job) -> Any:
        loaders, data, held = made()
        return lengths(list(job.prepare(*loaders, batch="global")), data, held)

    expected = lengths(*made())
    for size in (1, 2, 3):
        assert on(size, loop) == [expected] * size
