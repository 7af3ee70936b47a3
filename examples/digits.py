"""Handwritten digits on any number of workers: the same file runs in four ways.

python examples/digits.py
paceline run -n 3 examples/digits.py
torchrun --nproc-per-node 3 examples/digits.py
mpirun -n 3 python examples/digits.py
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import paceline

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--strategy", default="all_reduce")
parser.add_argument("--global-batch", type=int, default=48)
arguments = parser.parse_args()

job = paceline.init(seed=0)

digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32) / 16
labels = torch.tensor(digits.target)
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
train_set = TensorDataset(images[order[:1437]], labels[order[:1437]])
test_set = TensorDataset(images[order[1437:]], labels[order[1437:]])

model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
loader = DataLoader(train_set, batch_size=arguments.global_batch, shuffle=True)
model, optimizer, loader = job.prepare(model, optimizer, loader, strategy=arguments.strategy, batch="global")


def correct(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, int]:
    return (outputs.argmax(1) == targets).sum(), len(targets)


def loss_sum(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, int]:
    return functional.cross_entropy(outputs, targets, reduction="sum"), len(targets)


for epoch in job.epochs(arguments.epochs):
    for x, y in loader:
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    metrics = job.evaluate(model, test_set, metrics={"accuracy": correct, "loss": loss_sum})
    job.print(f"epoch {epoch + 1}: accuracy {metrics['accuracy']:.4f}, loss {metrics['loss']:.4f}")

stats = job.stats()
job.print(
    f"{stats['size']} workers, {stats['samples'] / stats['seconds']:.0f} samples/s,"
    f" {stats['training']['payload_bytes'] / stats['samples']:.0f} bytes sent per sample and worker"
)
