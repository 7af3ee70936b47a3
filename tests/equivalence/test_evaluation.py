"""Evaluation of every kind of loader and model: each sample once, as in one process, or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from runs import on, same_as_one_process
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
)

from paceline.errors import ConfigError, Mismatch
from paceline.train.job import Job

COUNT = 23


class Counted(IterableDataset):
    """A stream of pairs; shuffled by the global generator if asked to, or rank `own` by itself."""

    def __init__(self, *, shuffled: bool = False, own: int | None = None) -> None:
        self._shuffled, self._own = shuffled, own

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(COUNT).tolist() if self._shuffled else range(COUNT)
        for i in order:
            if self._own is None or i % 2 == self._own % 2:
                yield torch.tensor([float(i)]), i


class ByName(Dataset):
    """Its samples are found by names."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, name: str) -> Any:
        i = int(name[1:])
        return torch.tensor([float(i)]), i


def numbers() -> TensorDataset:
    return TensorDataset(torch.arange(COUNT, dtype=torch.float64).view(-1, 1), torch.arange(COUNT))


class Listing:
    """A metric object that keeps what it sees."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def reset(self) -> None:
        self.seen = []

    def update(self, outputs: Any, targets: Any) -> None:
        rows = outputs["rows"] if isinstance(outputs, dict) else outputs
        self.seen += rows.double().reshape(-1).tolist()

    def compute(self) -> list[float]:
        return list(self.seen)


def squares(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, int]:
    return (targets.double() ** 2).sum(), len(targets)


def largest(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Not a sum over samples: it depends on what a batch is."""
    return targets.max(), 1


def measured(job: Job, data: Any, *, prepared: bool = False, **options: Any) -> dict[str, Any]:
    loader = job.prepare(data) if prepared else data
    metrics = {"squares": squares, "largest": largest, "seen": Listing()}
    return job.evaluate(nn.Identity(), loader, metrics, **options)


def doubled(samples: list[Any]) -> Any:
    return torch.stack([x for x, _ in samples]) * 2, torch.tensor([y for _, y in samples])


def distributed(job: Job) -> DistributedSampler[Any]:
    return DistributedSampler(numbers(), num_replicas=job.size, rank=job.rank, shuffle=True)


def batched(job: Job, sampler: Any) -> DataLoader[Any]:
    return DataLoader(numbers(), batch_sampler=BatchSampler(sampler, 4, drop_last=False))


LOADERS: dict[str, Callable[[Job], Any]] = {
    "plain": lambda job: DataLoader(numbers(), 4),
    "shuffle": lambda job: DataLoader(numbers(), 4, shuffle=True),
    "drop_last": lambda job: DataLoader(numbers(), 4, drop_last=True),
    "collate": lambda job: DataLoader(numbers(), 4, collate_fn=doubled),
    "distributed": lambda job: DataLoader(numbers(), 4, sampler=distributed(job)),
    "distributed batches": lambda job: batched(job, distributed(job)),
    "batches": lambda job: batched(job, SubsetRandomSampler(range(3, 20))),
    "numpy": lambda job: DataLoader(numbers(), 4, sampler=SubsetRandomSampler(np.arange(3, 19))),  # type: ignore[arg-type]
    "tensors": lambda job: DataLoader(numbers(), 4, sampler=list(torch.arange(5, 19))),  # type: ignore[arg-type]
    "numpy batches": lambda job: DataLoader(numbers(), batch_sampler=list(np.arange(20).reshape(5, 4))),  # type: ignore[arg-type]
    "names": lambda job: DataLoader(ByName(), 4, sampler=[f"n{i}" for i in range(2, 22)]),
    "no batching": lambda job: DataLoader(
        numbers(), batch_size=None, sampler=BatchSampler(range(COUNT), 4, drop_last=False)
    ),
    "replacement": lambda job: DataLoader(
        numbers(), 4, sampler=RandomSampler(numbers(), replacement=True, num_samples=17)
    ),
    "stream": lambda job: DataLoader(Counted(), 4),
    "shuffled stream": lambda job: DataLoader(Counted(shuffled=True), 4),
}


CASES = [(kind, False) for kind in LOADERS]
CASES += [(kind, True) for kind in LOADERS if kind not in ("no batching", "names")]  # not for training


@pytest.mark.parametrize(("kind", "prepared"), CASES)
def test_every_loader_gives_what_one_process_sees(kind: str, prepared: bool) -> None:
    same_as_one_process(lambda job: measured(job, LOADERS[kind](job), prepared=prepared))


@pytest.mark.parametrize("kind", ["plain", "distributed", "distributed batches", "stream"])
def test_all_samples_count_once(kind: str) -> None:
    for result in on(3, lambda job: measured(job, LOADERS[kind](job))):
        assert sorted(result["seen"]) == list(range(COUNT))
        assert result["squares"] == sum(i * i for i in range(COUNT)) / COUNT


def test_a_batch_size_of_its_own_makes_the_same_batches() -> None:
    same_as_one_process(lambda job: measured(job, LOADERS["shuffle"](job), batch_size=5))


def test_data_of_its_own_on_each_rank_counts_as_a_whole() -> None:
    def loop(job: Job) -> Any:
        own = torch.utils.data.Subset(numbers(), range(job.rank * 2, COUNT, 3) if job.rank else [])
        return measured(job, job.prepare(DataLoader(own, 2), shard=False))

    for result in on(3, loop):
        assert result["seen"] == [*range(2, COUNT, 3), *range(4, COUNT, 3)]


def test_other_data_on_a_rank_is_noticed() -> None:
    def loop(job: Job) -> Any:
        return measured(job, torch.utils.data.Subset(numbers(), range(job.rank == 2, 20)))

    with pytest.raises(Mismatch, match=r"data set of rank 2 differs.*prepare\(loader, shard=False\)"):
        on(3, loop)


def test_a_stream_that_divides_itself_is_noticed() -> None:
    with pytest.raises(Mismatch, match=r"stream of batches of rank 1 differs.*shard=False"):
        on(2, lambda job: measured(job, DataLoader(Counted(own=job.rank), 4)))


class Own(DistributedSampler):
    """Gives shares by a rule of its own."""

    def __iter__(self) -> Iterator[Any]:
        return iter(range(self.rank, COUNT, self.num_replicas))


def test_a_sampler_that_divides_by_its_own_rules_is_refused() -> None:
    def loop(job: Job) -> Any:
        sampler = Own(numbers(), num_replicas=job.size, rank=job.rank)
        return measured(job, DataLoader(numbers(), 4, sampler=sampler))

    with pytest.raises(ConfigError, match=r"Own gives each rank a share.*shard=False"):
        on(2, loop)


def test_the_users_generator_is_left_as_it_was() -> None:
    def loop(job: Job) -> Any:
        generator = torch.Generator().manual_seed(5)
        sampler = SubsetRandomSampler(range(3, 20), generator=generator)
        data = DataLoader(numbers(), 4, sampler=sampler, generator=generator)
        return measured(job, data), measured(job, data), torch.rand(3, generator=generator)

    same_as_one_process(loop)
    first, second, _ = on(2, loop)[0]
    assert first == second


@pytest.mark.parametrize("kind", ["other widths", "other dtypes", "dicts"])
def test_outputs_of_another_kind_in_each_batch(kind: str) -> None:
    def forward(model: Any, batch: Any) -> Any:
        x, y = batch
        if kind == "other widths":
            return x.expand(-1, 1 + int(y[0]) % 3), y
        if kind == "other dtypes":
            return x.to([torch.float64, torch.float32][int(y[0]) % 8 // 4]), y
        return {"rows": x}, {"y": y}

    def loop(job: Job) -> Any:
        return job.evaluate(nn.Identity(), DataLoader(numbers(), 4), {"seen": Listing()}, forward=forward)

    same_as_one_process(loop)


def test_a_metric_of_many_numbers_is_refused() -> None:
    metrics = {"each": lambda values, targets: (values, 1)}
    with pytest.raises(ConfigError, match=r"'each' returned a tensor of shape \[4, 1\]"):
        on(1, lambda job: job.evaluate(nn.Identity(), DataLoader(numbers(), 4), metrics))


def trained(job: Job) -> tuple[nn.Module, nn.Module]:
    """A model under local_sgd, and a copy that averages this rank's models over time."""
    torch.manual_seed(1)
    model: Any = nn.Linear(1, 1, dtype=torch.float64)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.01)
    loader: Any = DataLoader(numbers(), 2)
    ema = copy.deepcopy(model)
    model, optimizer, loader = job.prepare(model, optimizer, loader, strategy="local_sgd(period=100)")
    for x, _ in loader:
        optimizer.zero_grad()
        model(x / COUNT).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            for mine, other in zip(ema.parameters(), model.parameters(), strict=True):
                mine.lerp_(other, 0.5)
    return model, ema


def outputs(values: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, int]:
    return values.sum(), len(values)


def test_a_copy_that_differs_over_the_ranks_is_refused() -> None:
    def loop(job: Job) -> Any:
        return job.evaluate(trained(job)[1], numbers(), {"mean": outputs})

    with pytest.raises(Mismatch, match=r"Linear, which is no prepared model.*average=True"):
        on(2, loop)


def test_a_copy_is_averaged_where_asked_for() -> None:
    def loop(job: Job) -> Any:
        _, ema = trained(job)
        before = [p.clone() for p in ema.parameters()]
        result = job.evaluate(ema, numbers(), {"mean": outputs}, average=True)
        assert all(torch.equal(a, b) for a, b in zip(before, ema.parameters(), strict=True))
        return result["mean"], [float(p.detach()) for p in ema.parameters()]

    results = on(3, loop)
    weight, bias = (sum(own[i] for _, own in results) / 3 for i in (0, 1))
    for mean, _ in results:
        assert mean == pytest.approx(weight * (COUNT - 1) / 2 + bias, abs=1e-9)


def test_a_part_of_a_prepared_model_is_its_consensus() -> None:
    def loop(job: Job) -> Any:
        model, _ = trained(job)
        whole = job.evaluate(model, numbers(), {"mean": outputs})
        return whole, job.evaluate(nn.Sequential(model), numbers(), {"mean": outputs})

    for whole, part in on(2, loop):
        assert whole == part
