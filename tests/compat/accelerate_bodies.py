"""What ranks do in the Accelerate tests."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from paceline.compat.accelerate import evaluating, job_of, prepare


def begin(strategy: str, accumulate: int = 1, *, ours: bool = True) -> tuple[Any, ...]:
    torch.set_num_threads(1)
    torch.manual_seed(4)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    x = torch.randn(64, 6)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)
    loader = DataLoader(TensorDataset(x, x.prod(1, keepdim=True)), batch_size=4)
    objects = (model, optimizer, loader, scheduler)
    prepared = prepare(accelerator, *objects, strategy=strategy) if ours else accelerator.prepare(*objects)
    return (accelerator, *prepared)


def steps(accelerator: Any, model: Any, optimizer: Any, loader: Any, scheduler: Any) -> None:
    model.train()
    for x, y in loader:
        with accelerator.accumulate(model):
            accelerator.backward(functional.mse_loss(model(x), y))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


def flat(model: torch.nn.Module) -> list[float]:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).tolist()


def resumes(folder: str, strategy: str) -> dict[str, Any]:
    accelerator, *rest = begin(strategy)
    steps(accelerator, *rest)
    before = flat(rest[0])
    with evaluating(accelerator):
        consensus = flat(rest[0])
    unchanged = before == flat(rest[0])
    accelerator.save_state(folder)
    steps(accelerator, *rest)
    accelerator.end_training()
    whole, stats = flat(rest[0]), job_of(accelerator).stats()
    other, *again = begin(strategy)
    other.load_state(folder)
    steps(other, *again)
    other.end_training()
    return {
        "whole": whole,
        "resumed": flat(again[0]),
        "unchanged": unchanged,
        "consensus": consensus,
        "replica": before,
        "samples": stats["samples"],
    }


def beside_ddp(accumulate: int) -> dict[str, Any]:
    ours = begin("all_reduce", accumulate)
    steps(*ours)
    theirs = begin("all_reduce", accumulate, ours=False)
    steps(*theirs)
    return {"ours": flat(ours[1]), "theirs": flat(theirs[1])}
