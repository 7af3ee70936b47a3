"""The data of generated loops: samples, the forms of their batches, and how they are read."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from choices import Choices
from models import WIDTH
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
    random_split,
)

Pair = namedtuple("Pair", ["x", "y"])


class Samples(Dataset):
    """Sample i is a row of inputs and one of targets, in the form that batches are to have."""

    def __init__(self, count: int, form: str, *, shift: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(5)
        self.x = torch.randn(count, WIDTH, generator=generator, dtype=torch.float64) + shift
        self.y = torch.sin(3 * self.x.flip(1))
        self.form = form

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Any:
        x, y = self.x[i], self.y[i]
        if self.form == "dict":
            return {"x": x, "y": y, "number": i}
        if self.form == "named":
            return Pair(x, y)
        return ({"x": x}, [y]) if self.form == "nested" else (x, y)


def collate(form: str) -> Any:
    """The collate function of this form of batch; None: torch's own."""
    if form == "scalar_first":
        return lambda rows: {
            "temperature": torch.tensor(2.0),
            "x": default_collate(rows)[0],
            **_targets(rows),
        }
    if form == "time_first":
        return lambda rows: tuple(part.t().contiguous() for part in default_collate(rows))
    return None


def _targets(rows: Any) -> dict[str, Any]:
    return {"y": default_collate(rows)[1]}


def batch_size_of(form: str) -> Any:
    """What `prepare` must be told to count the samples of such a batch; None: nothing."""
    return {"time_first": lambda batch: batch[0].shape[1], "nested": lambda batch: len(batch[1][0])}.get(form)


def parts(batch: Any, form: str = "") -> tuple[Any, Any]:
    """Inputs and targets, one row for each sample."""
    if isinstance(batch, dict):
        return batch["x"], batch["y"]
    x, y = batch
    if form == "time_first":
        return x.t(), y.t()
    return (x["x"], y[0]) if isinstance(x, dict) else (x, y)


class Backwards(Sampler):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.count - 1, -1, -1))


class Endless(Sampler):
    def __iter__(self) -> Iterator[int]:
        while True:
            yield 0


class Stream(IterableDataset):
    """The samples without numbers, in another order in each pass if `shuffles`."""

    def __init__(self, samples: Any, *, shuffles: bool) -> None:
        self.samples, self.shuffles = samples, shuffles

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(len(self.samples)) if self.shuffles else torch.arange(len(self.samples))
        return (self.samples[int(i)] for i in order)


def loader_of(c: Choices, job: Any) -> DataLoader[Any]:
    """What the loop hands to `prepare`."""
    differs = c["habit"] == "other_data" and job.rank > 0
    samples: Any = Samples(c["samples"], c["batch"], shift=0.5 if differs else 0.0)
    if c["data"] == "split":
        samples, _ = random_split(samples, [len(samples) - len(samples) // 3, len(samples) // 3])
    more: Any = {"collate_fn": collate(c["batch"])}
    if c["data"] == "stream":
        stream = Stream(samples, shuffles=c["order"] == "shuffle")
        return DataLoader(stream, c["batch_size"], drop_last=c["drop_last"], **more)
    if c["data"] == "own":
        return DataLoader(samples, batch_sampler=own_batches(c, len(samples), job), **more)
    return _of_map(c, samples, more)


def _of_map(c: Choices, samples: Any, more: dict[str, Any]) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(11)
    order, count = c["order"], len(samples)
    if c["habit"] == "endless":
        return DataLoader(samples, c["batch_size"], sampler=Endless(), **more)
    if order == "batch_sampler":
        sampler = RandomSampler(samples, generator=generator)
        batches = BatchSampler(sampler, c["batch_size"], drop_last=False)
        return DataLoader(samples, batch_sampler=batches, **more)
    every_other = range(0, count, 1 if count < 3 else 2)
    own: Any = {
        "subset": lambda: SubsetRandomSampler(every_other, generator),
        "numpy_subset": lambda: SubsetRandomSampler(np.array(every_other), generator),
        "weighted": lambda: WeightedRandomSampler(
            [1.0 + i for i in range(count)], count, generator=generator
        ),
        "own_sampler": lambda: Backwards(count),
    }
    return DataLoader(
        samples,
        c["batch_size"],
        shuffle=order == "shuffle",
        sampler=own[order]() if order in own else None,
        drop_last=c["drop_last"],
        **more,
    )


def own_batches(c: Choices, count: int, job: Any) -> list[list[int]]:
    """The shares of one rank in the minibatches of one process, of uneven sizes where they do not divide."""
    order = list(range(count))
    if c["order"] == "shuffle":
        order = torch.randperm(count, generator=torch.Generator().manual_seed(11)).tolist()
    size = c["batch_size"]
    whole = [order[i : i + size] for i in range(0, count, size)]
    kept = [batch for batch in whole if len(batch) == size or not c["drop_last"]]
    shares = [np.array_split(batch, job.size)[job.rank].tolist() for batch in kept]
    return [share for share in shares if share]


def fetched(loader: Any, how: str) -> Iterator[Any]:
    """Batches one by one, each when the next one has been fetched, or all when all have been."""
    if how == "all":
        yield from list(loader)
        return
    if how == "one":
        yield from loader
        return
    batches = iter(loader)
    batch = next(batches, None)
    while batch is not None:
        following = next(batches, None)
        yield batch
        batch = following
