"""A loop without a DataLoader: each rank takes its rows of every batch from tensors.

python examples/loops/no_loader.py
paceline run -n 2 examples/loops/no_loader.py
torchrun --nproc-per-node 2 examples/loops/no_loader.py
"""

import torch
from torch import nn
from torch.nn import functional

import paceline
from paceline import Job

BATCH = 25


def train(job: Job) -> tuple[float, nn.Module]:
    generator = torch.Generator().manual_seed(0)  # the same rows and the same order on all ranks
    x = torch.randn(230, 6, generator=generator)
    y = (x.sin().sum(1) > 0).long()
    model = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    model, optimizer = job.prepare(model, optimizer)

    for epoch in job.epochs(4):
        order = torch.randperm(len(x), generator=generator)
        total = 0.0
        for batch in order.split(BATCH):
            own = batch[job.rank :: job.size]
            job.weight(len(own))  # a batch of 25 rows gives one rank of two a row more
            loss = functional.cross_entropy(model(x[own]), y[own])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(own)
        mean = job.all_reduce_metrics({"total": total})["total"] / len(x)
        job.print(f"epoch {epoch + 1}: loss {mean:.4f}")
    return mean, model


if __name__ == "__main__":
    job = paceline.init(seed=0)
    loss, model = train(job)
    norm = nn.utils.parameters_to_vector(model.parameters()).norm().item()
    job.print(f"final loss {loss:.6f}, norm of the parameters {norm:.6f}")
