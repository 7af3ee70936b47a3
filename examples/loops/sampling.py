"""Where samples come from: a stream with worker processes, a weighted sampler, batches by length.

python examples/loops/sampling.py --variant stream
paceline run -n 2 examples/loops/sampling.py --variant weighted
torchrun --nproc-per-node 2 examples/loops/sampling.py --variant by_length
"""

import argparse
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, WeightedRandomSampler

import paceline
from paceline import Job

Sample = tuple[torch.Tensor, torch.Tensor]


def rows(count: int = 110) -> list[Sample]:
    """Sequences of different lengths; the label says whether their sum is positive."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 9, (count,), generator=generator).tolist()
    found = [torch.randn(n, 3, generator=generator) for n in lengths]
    return [(x, (x.sum() > 0).long()) for x in found]


class Rows(Dataset):
    def __init__(self) -> None:
        self.rows = rows()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        return self.rows[index]


class Stream(IterableDataset):
    """The same rows one after the other, divided over the loader's workers as torch's manual says."""

    def __iter__(self) -> Iterator[Sample]:
        worker = torch.utils.data.get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        yield from rows()[first::step]


class ByLength(Sampler[list[int]]):
    """Batches of sequences of nearly equal length, in another order in each epoch."""

    def __init__(self, data: Rows, size: int) -> None:
        ordered = sorted(range(len(data)), key=lambda i: len(data[i][0]))
        self.batches = [ordered[i : i + size] for i in range(0, len(ordered), size)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        for i in torch.randperm(len(self.batches)).tolist():
            yield self.batches[i]


def collate(samples: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    sequences, labels = zip(*samples, strict=True)
    return pad_sequence(sequences, batch_first=True), torch.stack(labels)


def loader_of(variant: str) -> DataLoader:
    if variant == "stream":
        return DataLoader(Stream(), batch_size=12, num_workers=2, collate_fn=collate)
    data = Rows()
    if variant == "by_length":
        return DataLoader(data, batch_sampler=ByLength(data, 12), collate_fn=collate)
    labels = torch.stack([label for _, label in data.rows])
    weights = (1.0 / torch.bincount(labels).float())[labels]
    sampler = WeightedRandomSampler(weights.tolist(), num_samples=len(data))
    return DataLoader(data, batch_size=12, sampler=sampler, collate_fn=collate)


class Summed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.each = nn.Sequential(nn.Linear(3, 12, bias=False), nn.Tanh())  # padding stays zero
        self.head = nn.Linear(12, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.each(x).sum(1))


def train(job: Job, variant: str) -> tuple[float, nn.Module]:
    model = Summed()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model, optimizer, loader = job.prepare(model, optimizer, loader_of(variant), batch="global")
    for epoch in job.epochs(3):
        total, count = 0.0, 0
        for x, y in loader:
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            own = loader.own_samples  # 0 where a short batch leaves nothing to this rank: it repeats another
            total, count = total + loss.item() * own, count + own
        mean = job.all_reduce_metrics({"loss": (total, count)})["loss"]
        job.print(f"epoch {epoch + 1}: loss {mean:.4f}")
    return mean, model


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--variant", choices=("stream", "weighted", "by_length"), default="stream")
    variant = parser.parse_args().variant
    job = paceline.init(seed=0)
    loss, model = train(job, variant)
    norm = nn.utils.parameters_to_vector(model.parameters()).norm().item()
    job.print(f"final loss {loss:.6f}, norm of the parameters {norm:.6f}")
