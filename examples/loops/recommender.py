"""A recommender: embeddings with sparse gradients and SparseAdam, a dense part with Adam.

Sparse gradients do not travel: methods that average models train with them, all_reduce needs dense ones.

python examples/loops/recommender.py
paceline run -n 2 examples/loops/recommender.py
torchrun --nproc-per-node 2 examples/loops/recommender.py --dense
"""

import argparse

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

import paceline
from paceline import Job

ITEMS, WIDTH = 50, 8


class Baskets(Dataset):
    """What a customer bought, and whether they like one more item."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        taste = torch.randn(ITEMS, 3, generator=generator)
        self.rows = []
        for size in torch.randint(1, 6, (count,), generator=generator).tolist():
            bought = torch.randint(ITEMS, (size,), generator=generator)
            item = torch.randint(ITEMS, (), generator=generator)
            self.rows.append((bought, item, (taste[bought].mean(0) @ taste[item] > 0).to(taste.dtype)))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.rows[index]


def collate(rows: list) -> tuple[torch.Tensor, ...]:
    baskets, items, likes = zip(*rows, strict=True)
    offsets = torch.tensor([0, *(len(b) for b in baskets[:-1])]).cumsum(0)
    return torch.cat(baskets), offsets, torch.stack(items), torch.stack(likes)


class Recommender(nn.Module):
    def __init__(self, *, sparse: bool) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(ITEMS, WIDTH, mode="mean", sparse=sparse)
        self.item = nn.Embedding(ITEMS, WIDTH, sparse=sparse)
        self.dense = nn.Sequential(nn.Linear(2 * WIDTH, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, basket: torch.Tensor, offsets: torch.Tensor, item: torch.Tensor) -> torch.Tensor:
        both = torch.cat([self.bag(basket, offsets), self.item(item)], 1)
        return self.dense(both).squeeze(1)


def train(job: Job, *, is_sparse: bool, strategy: str) -> tuple[float, nn.Module]:
    model = Recommender(sparse=is_sparse)
    kind = torch.optim.SparseAdam if is_sparse else torch.optim.Adam
    sparse = kind([model.bag.weight, model.item.weight], lr=1e-2)
    dense = torch.optim.Adam(model.dense.parameters(), lr=1e-2)
    loader = DataLoader(Baskets(200), batch_size=20, shuffle=True, collate_fn=collate)
    model, sparse, dense, loader = job.prepare(
        model, sparse, dense, loader, batch="global", strategy=strategy
    )
    for epoch in job.epochs(3):
        total, count = 0.0, 0
        for basket, offsets, item, likes in loader:
            loss = functional.binary_cross_entropy_with_logits(model(basket, offsets, item), likes)
            sparse.zero_grad()
            dense.zero_grad()
            loss.backward()
            sparse.step()
            dense.step()
            own = loader.own_samples  # 0 where a short batch leaves nothing to this rank: it repeats another
            total, count = total + loss.item() * own, count + own
        mean = job.all_reduce_metrics({"loss": (total, count)})["loss"]
        job.print(f"epoch {epoch + 1}: loss {mean:.4f}")
    return mean, model


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--dense", action="store_true")
    dense = parser.parse_args().dense
    job = paceline.init(seed=0)
    loss, model = train(job, is_sparse=not dense, strategy="all_reduce" if dense else "local_sgd(period=5)")
    norm = nn.utils.parameters_to_vector(model.parameters()).norm().item()
    job.print(f"final loss {loss:.6f}, norm of the parameters {norm:.6f}")
