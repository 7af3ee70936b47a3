"""Fine-tuning: low-rank adapters beside a frozen base, and a base that is unfrozen in mid-training.

python examples/loops/finetune.py --variant adapters
paceline run -n 2 examples/loops/finetune.py --variant unfreeze
torchrun --nproc-per-node 2 examples/loops/finetune.py --variant unfreeze
"""

import argparse

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import paceline
from paceline import Job


class Adapter(nn.Module):
    """A linear layer that stays as it is, plus a product of two small matrices."""

    def __init__(self, layer: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, layer.in_features) / layer.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + x @ self.down.T @ self.up.T


def points(count: int = 140) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 5, generator=generator)
    return TensorDataset(x, (x[:, 0] * x[:, 1] > 0).long())


def base() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 2))


def summed_loss(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, int]:
    return functional.cross_entropy(outputs, targets, reduction="sum"), len(targets)


def one_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader) -> None:
    model.train()
    for x, y in loader:
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def adapters(job: Job) -> nn.Module:
    model = base()
    for name in ("0", "2"):
        setattr(model, name, Adapter(getattr(model, name)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    loader = DataLoader(points(), batch_size=20, shuffle=True)
    model, optimizer, loader = job.prepare(model, optimizer, loader, batch="global")
    for _ in job.epochs(4):
        one_epoch(model, optimizer, loader)
    return model


def unfreeze(job: Job) -> nn.Module:
    """Two epochs of the head alone; then everything, by a new optimizer, after preparing again."""
    model = base()
    model[0].requires_grad_(False)
    model[2].requires_grad_(False)
    optimizer = torch.optim.Adam(model[4].parameters(), lr=0.02)
    loader = DataLoader(points(), batch_size=20, shuffle=True)
    model, optimizer, loader = job.prepare(model, optimizer, loader, batch="global")
    for epoch in job.epochs(4):
        if epoch == 2:
            model.requires_grad_(True)
            optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
            model, optimizer = job.prepare(model, optimizer)
        one_epoch(model, optimizer, loader)
    return model


VARIANTS = {"adapters": adapters, "unfreeze": unfreeze}


def train(job: Job, variant: str) -> tuple[float, nn.Module]:
    model = VARIANTS[variant](job)
    return job.evaluate(model, points(), metrics={"loss": summed_loss})["loss"], model


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--variant", choices=VARIANTS, default="adapters")
    variant = parser.parse_args().variant
    job = paceline.init(seed=0)
    loss, model = train(job, variant)
    norm = nn.utils.parameters_to_vector(model.parameters()).norm().item()
    job.print(f"final loss {loss:.6f}, norm of the parameters {norm:.6f}")
