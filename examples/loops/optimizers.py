"""Three other ways to take a step: LBFGS with a closure, Muon beside AdamW, and a compiled model.

python examples/loops/optimizers.py --variant lbfgs
paceline run -n 2 examples/loops/optimizers.py --variant muon
torchrun --nproc-per-node 2 examples/loops/optimizers.py --variant compiled
"""

import argparse
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import paceline
from paceline import Job


def waves(count: int = 130) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(count, 4, generator=generator)
    return TensorDataset(x, (3 * x).sin().sum(1, keepdim=True))


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))


def squared_error(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, int]:
    return functional.mse_loss(outputs, targets, reduction="sum"), len(targets)


def lbfgs(job: Job) -> nn.Module:
    """One step per epoch, on all samples, with a line search."""
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=5, line_search_fn="strong_wolfe")
    data = waves()
    loader = DataLoader(data, batch_size=len(data))
    model, optimizer, loader = job.prepare(model, optimizer, loader, batch="global")
    for _ in job.epochs(3):
        for x, y in loader:

            def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
                optimizer.zero_grad()
                loss = functional.mse_loss(model(x), y)
                loss.backward()
                return loss

            optimizer.step(closure)
    return model


def muon(job: Job) -> nn.Module:
    """Muon for the matrices, AdamW for the biases."""
    model = net()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    first = torch.optim.Muon(matrices, lr=0.02)
    second = torch.optim.AdamW(others, lr=0.01)
    loader = DataLoader(waves(), batch_size=16, shuffle=True)
    model, [first, second], loader = job.prepare(model, [first, second], loader, batch="global")
    for _ in job.epochs(3):
        for x, y in loader:
            functional.mse_loss(model(x), y).backward()
            for optimizer in (first, second):
                optimizer.step()
                optimizer.zero_grad()
    return model


def compiled(job: Job) -> nn.Module:
    """torch.compile around the model, before it is prepared."""
    model = torch.compile(net(), backend="aot_eager")  # the default backend makes C++ code, for a minute
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    loader = DataLoader(waves(), batch_size=16, shuffle=True)
    model, optimizer, loader = job.prepare(model, optimizer, loader, batch="global")
    for _ in job.epochs(3):
        for x, y in loader:
            optimizer.zero_grad()
            functional.mse_loss(model(x), y).backward()
            optimizer.step()
    return model


VARIANTS: dict[str, Callable[[Job], nn.Module]] = {"lbfgs": lbfgs, "muon": muon, "compiled": compiled}


def train(job: Job, variant: str) -> tuple[float, nn.Module]:
    model = VARIANTS[variant](job)
    return job.evaluate(model, waves(), metrics={"loss": squared_error})["loss"], model


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--variant", choices=VARIANTS, default="lbfgs")
    variant = parser.parse_args().variant
    job = paceline.init(seed=0)
    loss, model = train(job, variant)
    norm = nn.utils.parameters_to_vector(model.parameters()).norm().item()
    job.print(f"final loss {loss:.6f}, norm of the parameters {norm:.6f}")
