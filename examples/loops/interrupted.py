"""Training that may be interrupted: run the same line again, and it goes on where it was.

python examples/loops/interrupted.py --checkpoint runs/interrupted
paceline run -n 2 --checkpoint runs/interrupted examples/loops/interrupted.py
paceline run -n 2 --max-restarts 2 examples/loops/interrupted.py --checkpoint runs/interrupted --save-every 1
"""

import argparse
import hashlib
import os
import time

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import paceline
from paceline import Job


def rings(count: int = 120) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 2, generator=generator)
    return TensorDataset(x, (x.norm(dim=1) > 1.2).long())


def train(
    job: Job, *, pause_s: float = 0.0, save_every: int = 0, dropout: float = 0.1
) -> tuple[float, nn.Module]:
    epochs = 4
    model = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    loader = DataLoader(rings(), batch_size=12, shuffle=True)
    model, optimizer, loader, scheduler = job.prepare(model, optimizer, loader, scheduler, batch="global")
    loss = torch.zeros(())
    for epoch in job.epochs(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            time.sleep(pause_s)
            job.print(f"epoch {epoch + 1}, step {job.step}", flush=True)
        scheduler.step()
        if save_every and (epoch + 1) % save_every == 0:
            job.save(job.checkpoint)
    return job.all_reduce_metrics({"loss": (loss.item(), 1)})["loss"], model


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint")
    parser.add_argument("--save-every", type=int, default=0, help="epochs between two checkpoints; 0: none")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds of sleep after each step")
    arguments = parser.parse_args()
    job = paceline.init(seed=0, checkpoint=arguments.checkpoint)
    job.print(f"process {os.getpid()}", flush=True)
    loss, model = train(job, pause_s=arguments.pause, save_every=arguments.save_every)
    values = nn.utils.parameters_to_vector(model.parameters()).detach().numpy().tobytes()
    job.print(f"final loss {loss:.6f}, digest of the parameters {hashlib.sha256(values).hexdigest()[:16]}")
