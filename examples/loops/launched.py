"""Workers started from inside a program: an ordinary function, an ordinary call.

python examples/loops/launched.py
python - < examples/loops/launched.py
paceline run -n 2 -m examples.loops.launched      # from the root of the repository: each worker joins the job
"""

import os

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import paceline
from paceline import Job


def spirals(count: int = 100) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randint(2, (count,), generator=generator)
    radius = torch.rand(count, generator=generator)
    angle = 4 * radius + 3.14 * kinds
    return TensorDataset(torch.stack([radius * angle.cos(), radius * angle.sin()], 1), kinds)


def summed_loss(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, int]:
    return functional.cross_entropy(outputs, targets, reduction="sum"), len(targets)


def train(job: Job, rate: float) -> tuple[float, nn.Module]:
    data = spirals()
    model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    loader = DataLoader(data, batch_size=16, shuffle=True)
    model, optimizer, loader = job.prepare(model, optimizer, loader, batch="global")
    for _ in job.epochs(3):
        for x, y in loader:
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    return job.evaluate(model, data, metrics={"loss": summed_loss})["loss"], model


def work(rate: float) -> tuple[float, float]:
    """What each worker does; its result travels back to the caller."""
    job = paceline.init(seed=0, progress=False)
    loss, model = train(job, rate)
    norm = nn.utils.parameters_to_vector(model.parameters()).norm().item()
    job.print(f"final loss {loss:.6f}, norm of the parameters {norm:.6f}")
    return loss, norm


if __name__ == "__main__":
    if "WORLD_SIZE" in os.environ:  # started by `paceline run` or torchrun: this is one of the workers
        work(0.1)
    else:
        for loss, _ in paceline.launch(work, num_workers=2, args=(0.1,)):
            print(f"a worker found {loss:.6f}")
