"""Nested batches, outputs as a dict, several losses, bfloat16 autocast and a head in float64.

python examples/loops/nested_batches.py
paceline run -n 2 examples/loops/nested_batches.py
torchrun --nproc-per-node 2 examples/loops/nested_batches.py
"""

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

import paceline
from paceline import Job


class Readings(Dataset):
    """An item is a dict with a dict inside: two inputs, a class and a number."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.near = torch.randn(count, 4, generator=generator)
        self.far = torch.randn(count, 3, generator=generator)

    def __len__(self) -> int:
        return len(self.near)

    def __getitem__(self, index: int) -> dict:
        near, far = self.near[index], self.far[index]
        targets = {"kind": (near.sum() > 0).long(), "amount": (near[0] * far[0]).double()}
        return {"inputs": {"near": near, "far": far}, "targets": targets, "name": f"reading {index}"}


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.near = nn.Linear(4, 16)
        self.far = nn.Linear(3, 16)
        self.kind = nn.Linear(16, 2)
        self.amount = nn.Linear(16, 1, dtype=torch.float64)

    def forward(self, inputs: dict[str, torch.Tensor], *, low: bool) -> dict[str, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            hidden = torch.relu(self.near(inputs["near"]) + self.far(inputs["far"]))
            kind = self.kind(hidden)
        return {"kind": kind.double(), "amount": self.amount(hidden.double()).squeeze(1)}


def total_loss(outputs: dict, targets: dict, reduction: str = "mean") -> torch.Tensor:
    kind = functional.cross_entropy(outputs["kind"], targets["kind"], reduction=reduction)
    return kind + 0.5 * functional.mse_loss(outputs["amount"], targets["amount"], reduction=reduction)


def train(job: Job, *, low: bool = True) -> tuple[float, nn.Module]:
    data = Readings(100)
    model = TwoHeads()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    loader = DataLoader(data, batch_size=16, shuffle=True)
    model, optimizer, loader = job.prepare(model, optimizer, loader, batch="global")

    def summed(outputs: dict, targets: dict) -> tuple[torch.Tensor, int]:
        return total_loss(outputs, targets, reduction="sum"), len(targets["kind"])

    def forward(model: nn.Module, batch: dict) -> tuple[dict, dict]:
        return model(batch["inputs"], low=low), batch["targets"]

    for epoch in job.epochs(3):
        model.train()
        for batch in loader:
            optimizer.zero_grad()
            outputs = model(batch["inputs"], low=low)
            total_loss(outputs, batch["targets"]).backward()
            optimizer.step()
        metrics = job.evaluate(model, data, metrics={"loss": summed}, forward=forward)
        job.print(f"epoch {epoch + 1}: loss {metrics['loss']:.4f}")
    return metrics["loss"], model


if __name__ == "__main__":
    job = paceline.init(seed=0)
    loss, model = train(job)
    norm = sum(p.detach().double().square().sum().item() for p in model.parameters()) ** 0.5
    job.print(f"final loss {loss:.6f}, norm of the parameters {norm:.6f}")
