"""Streams, ready-made batches, data of its own on each rank, and resuming inside an epoch."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path
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
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)

from paceline.errors import CheckpointError, ConfigError, Mismatch
from paceline.train.data.batch_sizes import count_samples
from paceline.train.job import Job

COUNT = 22


def sample(i: int) -> tuple[torch.Tensor, int]:
    return torch.tensor([float(i), (i % 5) / 5], dtype=torch.float64), i % 3


class Counted(IterableDataset):
    """A stream of samples, in an order drawn from `draws`, or of batches of `batch`."""

    def __init__(self, draws: str = "", *, batch: int = 0, seed: int = 0) -> None:
        self._draws, self._batch, self._seed = draws, batch, seed

    def __iter__(self) -> Iterator[Any]:
        order = list(range(COUNT))
        if self._draws == "random":
            random.shuffle(order)
        elif self._draws == "torch":
            order = torch.randperm(COUNT).tolist()
        elif self._draws == "own":
            np.random.default_rng(self._seed).shuffle(order)
        for i in range(0, COUNT, self._batch) if self._batch else ():
            x, y = zip(*(sample(n) for n in order[i : i + self._batch]), strict=True)
            yield torch.stack(x), torch.tensor(y)
        yield from () if self._batch else map(sample, order)


def prepared(job: Job, loader: Any, **options: Any) -> tuple[Any, Any, Any]:
    torch.manual_seed(2)
    model: Any = nn.Sequential(nn.Linear(2, 3, dtype=torch.float64))
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.001)
    return job.prepare(model, optimizer, loader, **options)  # type: ignore[no-any-return]


@pytest.mark.parametrize("draws", ["", "random", "torch"])
@pytest.mark.parametrize("drop_last", [False, True])
def test_a_stream_is_divided_as_one_process_would_read_it(draws: str, drop_last: bool) -> None:
    def loop(job: Job) -> Any:
        source: Any = DataLoader(Counted(draws), 6, drop_last=drop_last)
        model, optimizer, loader = prepared(job, source, batch="global")
        if job.rank == 0:
            next(iter(loader))
        for _ in job.epochs(2):
            for batch in loader:
                step(model, optimizer, batch)
        return state(model), job.step, job.samples

    same_as_one_process(loop, sizes=(2, 3, 4))
    assert on(3, loop)[0][1:] == ((6, 36) if drop_last else (8, 2 * COUNT))


def test_a_stream_with_another_order_on_each_rank_is_noticed() -> None:
    def loop(job: Job) -> None:
        model, optimizer, loader = prepared(job, DataLoader(Counted("own", seed=job.rank), 3))
        for batch in loader:
            step(model, optimizer, batch)

    with pytest.raises(Mismatch, match=r"first minibatch of the stream of rank 1 differs.*shard=False"):
        on(2, loop)


def test_ready_made_batches_count_their_samples() -> None:
    """Batches of 5, 5, 5, 5 and 2 on two ranks: each sample has the same weight in its step."""

    def loop(job: Job) -> Any:
        model, optimizer, loader = prepared(job, DataLoader(Counted(batch=5), batch_size=None))
        for batch in loader:
            step(model, optimizer, batch)
        return state(model), job.samples

    rows = [sample(i) for i in range(COUNT)]
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(2, 3, dtype=torch.float64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    for part in (rows[:10], rows[10:20], rows[20:]):
        step(model, optimizer, (torch.stack([x for x, _ in part]), torch.tensor([y for _, y in part])))
    for ours, samples in on(2, loop):
        assert samples == COUNT
        assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(ours, state(model), strict=True))


def test_ready_made_batches_cannot_be_divided() -> None:
    def loop(job: Job) -> None:
        prepared(job, DataLoader(Counted(batch=5), batch_size=None), batch="global")

    on(1, loop)
    with pytest.raises(ConfigError, match=r"cannot divide batches that the data set makes"):
        on(2, loop)


@dataclasses.dataclass
class Fields:
    x: torch.Tensor


X, Y = torch.zeros(4, 2), torch.zeros(4)
CLEAR = {
    "tensor": X,
    "fields": (X, Y),
    "dict": {"x": X, "y": Y, "names": ["a", "b", "c", "d"]},
    "scalar first": {"epoch": torch.tensor(3), "x": X},
    "nested": (X, {"a": Y}),
}
UNCLEAR = {
    "time first": (torch.zeros(7, 4, 2), Y),
    "images of one shape": [torch.zeros(3, 8, 8)] * 4,
    "detection": (tuple(torch.zeros(3, 8, 8 + i) for i in range(4)), tuple({"boxes": X} for _ in range(4))),
    "list of dicts": [{"boxes": X}, {"boxes": X[:2]}],
    "dataclass": Fields(X),
}


@pytest.mark.parametrize("kind", CLEAR)
def test_clear_batch_sizes(kind: str) -> None:
    assert count_samples(CLEAR[kind]) == 4


@pytest.mark.parametrize("kind", UNCLEAR)
def test_unclear_batch_sizes_are_refused_or_said(kind: str) -> None:
    class One(IterableDataset):
        def __iter__(self) -> Iterator[Any]:
            yield UNCLEAR[kind]
            yield UNCLEAR[kind]

    def loop(job: Job, said: Any) -> int:
        _, _, loader = prepared(job, DataLoader(One(), batch_size=None), shard=False, batch_size_of=said)
        for _ in loader:
            pass
        assert job.step == 0  # nothing was trained
        return sum(1 for _ in loader)

    with pytest.raises(ConfigError, match=r"job\.prepare\(…, batch_size_of="):
        on(2, lambda job: loop(job, None))
    assert on(2, lambda job: loop(job, lambda batch: 4)) == [2, 2]


class Noisy(Dataset[Any]):
    """Each sample has a random number, as an augmentation would."""

    def __init__(self, rank: int = 0) -> None:
        self._rank = rank

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> Any:
        x, y = sample(100 * self._rank + i)
        return x + torch.rand(2, dtype=torch.float64) / 10, y


@pytest.mark.parametrize("has_generator", [False, True])
@pytest.mark.parametrize("kind", ["own data", "stream"])
def test_a_resumed_epoch_goes_on_where_it_was(kind: str, has_generator: bool, tmp_path: Path) -> None:
    def loop(job: Job, mode: str) -> Any:
        generator = torch.Generator().manual_seed(5) if has_generator else None
        source: Any = DataLoader(Noisy(job.rank), 2, shuffle=True, generator=generator)
        if kind == "stream":
            source = DataLoader(Counted("torch"), 2)
        torch.manual_seed(3 + job.rank)
        model, optimizer, loader = prepared(job, source, shard=kind == "stream")
        if mode == "resume":
            torch.manual_seed(99)
            job.load(tmp_path)
        seen: list[list[int]] = []
        for _ in job.epochs(3):
            for batch in loader:
                torch.rand(job.rank + 1)  # as dropout draws
                seen.append(step(model, optimizer, batch))
                if job.step == 8 and mode == "save":
                    job.save(tmp_path)
                    seen.clear()
        return seen, state(model)

    saved, resumed = on(2, lambda job: loop(job, "save")), on(2, lambda job: loop(job, "resume"))
    for (a, ours), (b, theirs) in zip(saved, resumed, strict=True):
        assert a == b and len(a) > 8
        assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("before", "after"), [((2, 6), (3, 6)), ((3, 6), (1, 4)), ((1, 4), (2, 6)), ((2, 4), (2, 5))]
)
@pytest.mark.parametrize("kind", ["shuffle", "sampler", "batches", "stream"])
def test_another_size_goes_on_after_the_samples_that_were_trained(
    kind: str, before: tuple[int, int], after: tuple[int, int], tmp_path: Path
) -> None:
    def loop(job: Job, batch_size: int, mode: str) -> Any:
        x = torch.stack([sample(i)[0] for i in range(COUNT)])
        data = TensorDataset(x, torch.arange(COUNT) % 3)
        chosen = SubsetRandomSampler(range(COUNT))
        loaders: dict[str, Any] = {
            "shuffle": DataLoader(data, batch_size, shuffle=True),
            "sampler": DataLoader(data, batch_size, sampler=chosen),
            "batches": DataLoader(data, batch_sampler=BatchSampler(chosen, 2, drop_last=False)),
            "stream": DataLoader(Counted("torch"), batch_size),
        }
        # Whole batches of a batch sampler: as many in a round as there are ranks.
        how = "per_worker" if kind == "batches" else "global"
        model, optimizer, loader = prepared(job, loaders[kind], batch=how)
        counts: list[int] = []
        loader.on_batch.append(lambda own, every, is_last: counts.append(own))
        if mode == "resume":
            job.load(tmp_path)
        epochs = []
        for _ in job.epochs(2):
            seen = []
            for batch in loader:
                own = step(model, optimizer, batch)
                counted = own if counts[-1] else []  # a rank without samples repeats some
                seen += [i for part in job.gather_objects(counted) for i in part]
                if job.step == 2 and mode == "save":
                    job.save(tmp_path)
                    return [seen]
            epochs.append(seen)
        return epochs

    (first,) = on(before[0], lambda job: loop(job, before[1], "save"))[0]
    rest, whole = on(after[0], lambda job: loop(job, after[1], "resume"))[0]
    assert sorted(first + rest) == sorted(whole) == list(range(COUNT))


def test_the_pass_after_one_that_went_on_with_another_batch_size_is_whole(tmp_path: Path) -> None:
    def loop(job: Job, batch_size: int, *, stops_at: int, loads: bool = True) -> list[int]:
        x = torch.stack([sample(i)[0] for i in range(COUNT)])
        data = DataLoader(TensorDataset(x, torch.arange(COUNT) % 3), batch_size, shuffle=True)
        model, optimizer, loader = prepared(job, data)
        if loads:
            job.load(tmp_path)
        seen: list[int] = []
        for _ in job.epochs(2):
            for batch in loader:
                seen += step(model, optimizer, batch)
                if job.step == stops_at:
                    job.save(tmp_path)
                    return seen
            job.save(tmp_path)
            if stops_at:
                break
        return seen

    (first,) = on(1, lambda job: loop(job, 4, stops_at=2, loads=False))
    (rest,) = on(1, lambda job: loop(job, 3, stops_at=-1))
    (second,) = on(1, lambda job: loop(job, 3, stops_at=0))
    assert sorted(first + rest) == sorted(second) == list(range(COUNT))


@pytest.mark.parametrize(("size", "batch_size"), [(3, 2), (2, 3)])
def test_own_data_cannot_be_resumed_with_another_size_inside_an_epoch(
    size: int, batch_size: int, tmp_path: Path
) -> None:
    def loop(job: Job, batch_size: int, *, saves: bool) -> None:
        model, optimizer, loader = prepared(job, DataLoader(Noisy(job.rank), batch_size), shard=False)
        if not saves:
            job.load(tmp_path)
        for batch in loader:
            step(model, optimizer, batch)
            job.save(tmp_path)
            break

    on(2, lambda job: loop(job, 2, saves=True))
    with pytest.raises(CheckpointError, match=r"shard=False.*save at the end of an epoch"):
        on(size, lambda job: loop(job, batch_size, saves=False))


def other(job: Job, kind: str) -> Any:
    x = torch.arange(24.0, dtype=torch.float64).view(12, 2)
    data: Any = TensorDataset(x, torch.arange(12) % 3)
    is_other = job.rank == 1
    if kind == "length":
        data = Subset(data, range(10 + is_other))
    elif kind == "split":
        data = Subset(data, range(is_other, 10 + is_other))
    elif kind == "row":
        data = TensorDataset(
            x + torch.eye(12, 2)[[11, 10, 9, 8, 7, 0, 6, 5, 4, 3, 2, 1]] * is_other, data.tensors[1]
        )
    elif kind == "files":
        data = Listed([f"/host{job.rank}/{i + is_other}.png" for i in range(12)])
    if kind == "batch size":
        return DataLoader(data, 2 + is_other)
    return DataLoader(data, 2, shuffle=kind == "sampler" and is_other, num_workers=int(kind == "files"))


class Listed(Dataset[Any]):
    def __init__(self, files: list[str]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Any:
        raise AssertionError("no sample is loaded in the main process")


@pytest.mark.parametrize("kind", ["length", "split", "row", "files", "batch size", "sampler"])
def test_other_data_on_a_rank_is_noticed(kind: str) -> None:
    on(1, lambda job: prepared(job, other(job, kind)))
    with pytest.raises(Mismatch, match=r"of rank 1 differs from rank 0's.*shard=False"):
        on(3, lambda job: prepared(job, other(job, kind)))


@pytest.mark.parametrize("kind", ["equal files elsewhere", "random samples", "own data"])
def test_equal_data_is_not_refused(kind: str) -> None:
    def loop(job: Job) -> None:
        files: Any = DataLoader(Listed([f"/host{job.rank}/{i}.png" for i in range(12)]), 2, num_workers=1)
        loaders = {"equal files elsewhere": files, "random samples": DataLoader(Noisy(), 2)}
        loaders["own data"] = DataLoader(Noisy(job.rank), 2 + job.rank)
        before = torch.get_rng_state()
        job.prepare(loaders[kind], shard=kind != "own data")
        assert job.rank or torch.equal(before, torch.get_rng_state())

    on(2, loop)


class Sized(Counted):
    def __len__(self) -> int:
        return COUNT


@pytest.mark.parametrize("batch_size", [1, 4, 5, COUNT, 40])
@pytest.mark.parametrize("drop_last", [False, True])
def test_a_stream_that_knows_its_length_has_as_many_minibatches_as_in_one_process(
    batch_size: int, drop_last: bool
) -> None:
    source = DataLoader(Sized(), batch_size, drop_last=drop_last)

    def loop(job: Job) -> tuple[int, int]:
        loader = job.prepare(source, batch="global")
        return len(loader), sum(1 for _ in loader)

    assert set(on(3, loop)) == {(len(source), len(source))}
    with pytest.raises(TypeError):
        on(2, lambda job: len(job.prepare(DataLoader(Counted(), 4))))


def test_own_data_has_as_many_minibatches_as_the_longest() -> None:
    def loop(job: Job) -> tuple[int, int]:
        loader = job.prepare(DataLoader(range(4 + 3 * job.rank), 2), shard=False)
        return len(loader), sum(1 for _ in loader)

    assert set(on(3, loop)) == {(5, 5)}
    with pytest.raises(TypeError, match="no length"):
        on(2, lambda job: len(job.prepare(DataLoader(Counted(), 4), shard=False)))
