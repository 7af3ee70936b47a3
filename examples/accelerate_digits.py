"""Handwritten digits with Accelerate; the loop is Accelerate's, the method Paceline's.

python examples/accelerate_digits.py
paceline run -n 2 examples/accelerate_digits.py --strategy 'local_sgd(period=4)'
"""

import argparse
import os

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from paceline.compat.accelerate import evaluating, job_of, prepare

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--epochs", type=int, default=15)
parser.add_argument("--strategy", default="all_reduce")
parser.add_argument("--backend", help="of torch.distributed, for what Accelerate sends")
parser.add_argument("--accumulate", type=int, default=1)
parser.add_argument("--save", help="a folder for the state after each epoch")
parser.add_argument("--resume", help="a folder to go on from")
arguments = parser.parse_args()

if arguments.backend and "RANK" in os.environ:  # otherwise Accelerate takes Gloo
    dist.init_process_group(arguments.backend)
set_seed(0)
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=arguments.accumulate)

digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32) / 16
labels = torch.tensor(digits.target)
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
train, test = order[:1437], order[1437:]

model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
loader = DataLoader(TensorDataset(images[train], labels[train]), batch_size=24, shuffle=True)
test_loader = DataLoader(TensorDataset(images[test], labels[test]), batch_size=180)
model, optimizer, loader, test_loader = prepare(
    accelerator, model, optimizer, loader, test_loader, strategy=arguments.strategy
)
if arguments.resume:
    accelerator.load_state(arguments.resume)

for epoch in range(arguments.epochs):
    model.train()
    for x, y in loader:
        with accelerator.accumulate(model):
            accelerator.backward(functional.cross_entropy(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    with evaluating(accelerator), torch.no_grad():
        pairs = [accelerator.gather_for_metrics((model(x).argmax(1), y)) for x, y in test_loader]
    accuracy = sum(int((a == b).sum()) for a, b in pairs) / sum(len(b) for _, b in pairs)
    accelerator.print(f"epoch {epoch + 1}: accuracy {accuracy:.4f}")
    if arguments.save:
        accelerator.save_state(arguments.save)

accelerator.end_training()
stats = job_of(accelerator).stats()
accelerator.print(f"{stats['size']} workers, {stats['steps']} steps, strategy {stats['strategy']}")
