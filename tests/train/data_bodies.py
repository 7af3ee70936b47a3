"""Bodies about data: what each rank sees."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bodies
import torch
from rank_pool import alone
from torch import nn
from torch.nn import functional
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    SubsetRandomSampler,
)

from paceline.train.data.loader import known_length
from paceline.train.data.shard import shard
from paceline.train.job import Job


class Numbers(Dataset):
    """Sample i is i; `noisy` adds a random number, as an augmentation would."""

    def __init__(self, count: int, noisy: bool = False) -> None:
        self._count, self._noisy = count, noisy

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(index + (float(torch.rand(())) / 2 if self._noisy else 0.0))


class Stream(IterableDataset):
    def __init__(self, count: int, batch: int | None = None) -> None:
        self._count, self._batch = count, batch

    def __iter__(self) -> Iterator[torch.Tensor]:
        step = self._batch or 1
        for i in range(0, self._count, step):
            yield torch.arange(i, min(i + step, self._count)) if self._batch else torch.tensor(i)


class Own(IterableDataset):
    """Divided by the user, unevenly: rank r has 3 + 2r samples."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def __iter__(self) -> Iterator[torch.Tensor]:
        yield from (torch.tensor(100 * self._rank + i) for i in range(3 + 2 * self._rank))


def make_loader(kind: str, count: int, batch: int, workers: int) -> DataLoader[Any]:
    dataset = Numbers(count)
    if kind == "shuffle":
        return DataLoader(dataset, batch, shuffle=True, num_workers=workers)
    if kind == "order":
        return DataLoader(dataset, batch, num_workers=workers)
    if kind == "drop_last":
        return DataLoader(dataset, batch, drop_last=True, num_workers=workers)
    if kind == "distributed":
        sampler = DistributedSampler(dataset, num_replicas=3, rank=0)
        return DataLoader(dataset, batch, sampler=sampler, num_workers=workers)
    if kind == "subset":
        return DataLoader(dataset, batch, sampler=SubsetRandomSampler(range(count)), num_workers=workers)
    if kind == "batch_sampler":
        batches = BatchSampler(SubsetRandomSampler(range(count)), batch, drop_last=False)
        return DataLoader(dataset, batch_sampler=batches, num_workers=workers)
    if kind == "stream":
        return DataLoader(Stream(count), batch, num_workers=workers)
    assert kind == "ready batches"
    return DataLoader(Stream(count, batch), batch_size=None, num_workers=workers)


def epochs_of(job: Job, kind: str, count: int, *, epochs: int = 2, workers: int = 0, batch: int = 4) -> Any:
    """Per epoch: [(samples, own count, all count, is last)]."""
    loader = shard(make_loader(kind, count, batch, workers), job.comm, seed=3, per_worker=True, divided=True)
    facts: list[Any] = []
    loader.on_batch.append(lambda *f: facts.append(f))
    result = []
    for _ in range(epochs):
        facts.clear()
        seen = [batch.tolist() for batch in loader]
        result.append([(s, *f) for s, f in zip(seen, facts, strict=True)])
    return {"epochs": result, "len": known_length(loader)}


def resumed(job: Job, kind: str, *, stop: int) -> tuple[Any, Any]:
    """The rest of an epoch, continued and resumed, of a data set that draws random numbers."""

    def noisy() -> Any:
        dataset: Any = Numbers(50, noisy=True) if kind != "stream" else Stream(50)
        sampler = SubsetRandomSampler(range(50)) if kind == "subset" else None
        shuffle = True if kind == "shuffle" else None
        source = DataLoader(dataset, 3, shuffle=shuffle, sampler=sampler)
        return shard(source, job.comm, seed=3, per_worker=True, divided=True)

    torch.manual_seed(job.rank)
    first = noisy()
    iterator = iter(first)
    for _ in range(stop):
        next(iterator)
    position, random = first.state_dict(), torch.get_rng_state()
    continued = [batch.tolist() for batch in iterator] + [batch.tolist() for batch in first]
    second = noisy()
    torch.manual_seed(99)
    second.load_state_dict(position)
    torch.set_rng_state(random)
    return continued, [batch.tolist() for batch in second] + [batch.tolist() for batch in second]


def left_early(job: Job) -> list[list[float]]:
    loader = shard(DataLoader(Numbers(12), 1, shuffle=True), job.comm, seed=3, per_worker=True, divided=True)
    next(iter(loader))
    return [[loader.epoch], [float(b) for b in loader], [loader.epoch]]


def own_data(job: Job, strategy: str) -> dict[str, Any]:
    """Ranks with 3, 5 and 7 samples; the gradient of each step is the mean over the samples that exist."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=1.0)
    loader: Any = DataLoader(Own(job.rank), 2)
    model, optimizer, loader = job.prepare(model, optimizer, loader, strategy=strategy, shard=False)
    steps = 0
    for _ in job.epochs(1):
        for x in loader:
            model(x.float().view(-1, 1)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
    return {"weight": float(model.weight), "steps": steps, "samples": job.samples}


def correct(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, int]:
    return (outputs.argmax(1) == targets).sum(), len(targets)


def loss_sum(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, int]:
    return functional.cross_entropy(outputs, targets, reduction="sum"), len(targets)


class LastSeen:
    """A metric object as torchmetrics makes them: here the mean of the outputs, and how many."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.rows: list[torch.Tensor] = []

    def update(self, outputs: torch.Tensor, targets: torch.Tensor) -> None:
        self.rows.append(outputs[:, 0] * (targets + 1))

    def compute(self) -> torch.Tensor:
        return torch.cat(self.rows).sum() + 1000 * len(torch.cat(self.rows))


def evaluated(job: Job, count: int) -> dict[str, Any]:
    model = bodies.mlp(torch.float32)
    metrics = {"accuracy": correct, "loss": loss_sum, "object": LastSeen()}
    samples = bodies.data(count, torch.float32)
    try:
        ours = job.evaluate(model, DataLoader(samples, 7, shuffle=count > 0), metrics)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    x, y = samples.tensors
    with torch.no_grad():
        outputs = model(x)
    exact = int((outputs.argmax(1) == y).sum())
    loss = float(functional.cross_entropy(outputs.double(), y, reduction="sum")) / count
    metric = LastSeen()
    metric.update(outputs, y)
    return {"ours": ours, "correct": exact, "loss": loss, "object": float(metric.compute())}


def undisturbed(job: Job, strategy: str, evaluates: bool) -> str:
    """Training with evaluations in between ends at the same bits as without."""
    torch.manual_seed(4 + job.rank)
    layers = [nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout(0.3), nn.Linear(9, 2)]
    model = nn.Sequential(*layers)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    samples = bodies.data(48, torch.float32)
    loader: Any = DataLoader(samples, 4, shuffle=True)
    model, optimizer, loader = job.prepare(model, optimizer, loader, strategy=strategy)
    model[0].eval()  # an unusual mode must survive
    for _ in job.epochs(2):
        for x, y in loader:
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            if evaluates:
                first = job.evaluate(model, samples, {"loss": loss_sum}, batch_size=5)
                assert job.evaluate(model, samples, {"loss": loss_sum}, batch_size=5) == first
                assert model.training and not model[0].training
    return bodies.digest(model)


def trained_with_save(job: Job, strategy: str, folder: str, mode: str) -> Any:
    """Three epochs with Adam, scheduler and dropout; saved inside the second: `mode` continues or resumes."""
    torch.manual_seed(4 + job.rank)
    model = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Dropout(0.3), nn.Linear(9, 2))
    optimizer: Any = torch.optim.Adam(model.parameters(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.7)
    loader: Any = DataLoader(bodies.data(50, torch.float32), 4, shuffle=True)
    model, optimizer, loader = job.prepare(model, optimizer, loader, strategy=strategy, scheduler=scheduler)
    if mode == "resume":
        torch.manual_seed(1234)
        assert job.load(folder) == {"note": "half way"}
    steps = []
    for epoch in job.epochs(3):
        for x, y in loader:
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            steps.append((epoch, job.step))
            if mode == "continue" and job.step == 7:
                job.save(folder, extra={"note": "half way"})
                steps.clear()
    return bodies.digest(model), steps, optimizer.param_groups[0]["lr"]


def checkpoint_error(job: Job, folder: str, damage: str) -> tuple[str, list[str]]:
    model = nn.Linear(200, 200)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    job.prepare(model, optimizer)
    path = Path(folder)
    try:
        if damage == "full":
            with torch.no_grad():
                model.weight.fill_(1.0)
            job.save(folder)
            filler = path / "filler"
            if job.is_main:
                with filler.open("wb") as file:
                    file.truncate(0)
                    room = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
                    file.write(b"x" * max(0, room - 50_000))
            job.barrier()
            with torch.no_grad():
                model.weight.fill_(2.0)
            job.save(folder)
        elif damage == "missing":
            job.load(folder + "/nowhere")
        elif damage == "flipped":
            job.save(folder)
            if job.is_main:
                shard_file = next(path.glob("*.rank0.pt"))
                data = bytearray(shard_file.read_bytes())
                data[len(data) // 2] ^= 1
                shard_file.write_bytes(data)
            job.barrier()
            job.load(folder)
        elif damage == "other model":
            job.save(folder)
            other = Job(job.comm)
            other.prepare(nn.Linear(3, 3))
            other.load(folder)
        elif damage == "optimizer":
            job.save(folder)
            other, again = Job(job.comm), nn.Linear(200, 200)
            other.prepare(again, torch.optim.AdamW(again.parameters()))
            other.load(folder)
        elif damage == "strategy":
            job.save(folder)
            other = Job(job.comm)
            other.prepare(nn.Linear(200, 200), strategy="local_sgd")
            other.load(folder)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    else:
        text = "no error"
    if damage == "full":
        job.barrier()
        (path / "filler").unlink(missing_ok=True)
        job.load(folder)
        text += f" | kept {float(model.weight[0, 0])}"
    job.barrier()
    return text, sorted(p.name for p in path.iterdir()) if path.exists() else []


def other_size(job: Job, folder: str) -> tuple[str, str, int]:
    """Saved by all ranks in the middle of a local_sgd round, loaded by one."""
    model = bodies.mlp(torch.float32)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.5)
    loader: Any = DataLoader(bodies.data(30, torch.float32), 2, shuffle=True)
    model, optimizer, loader = job.prepare(model, optimizer, loader, strategy="local_sgd(period=4)")
    for _ in job.epochs(1):
        for x, y in loader:
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            if job.step == 3:
                job.save(folder)
                break
        break
    job.synchronize()
    job.barrier()
    one = alone(job)
    again = bodies.mlp(torch.float32)
    again_optimizer: Any = torch.optim.SGD(again.parameters(), lr=0.5)
    one.prepare(again, again_optimizer, loader.source, strategy="local_sgd(period=4)")
    one.load(folder)
    job.barrier()
    return bodies.digest(model), bodies.digest(again), one.next_epoch
