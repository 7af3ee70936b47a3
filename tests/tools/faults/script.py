"""A whole training run in which one rank does the wrong thing at one place; see `__main__.py`.

    script.py FAULT PHASE VICTIM STRATEGY DEADLINE FOLDER

FOLDER/fault holds the time of the fault, as `time.time()`, once it has come.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

import paceline

fault, phase, victim, strategy, deadline, folder = sys.argv[1:]


def act(*_: object) -> None:
    (Path(folder) / "fault").write_text(repr(time.time()))
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "sleep":
        time.sleep(600)
    elif fault == "loop":
        while True:
            pass
    elif fault == "leave":
        sys.exit(0)
    elif fault == "raise":
        raise ValueError("the fault of this run")
    else:  # a fault of the network, which the launcher of this script makes
        time.sleep(0.5)


def reached(where: str) -> None:
    if where == phase and os.environ["RANK"] == victim:
        act()


def metric(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[float, int]:
    return float((outputs - targets).square().sum()), len(targets)


def wait_for_the_others() -> None:
    """Loading torch takes longer than the deadline on a busy machine, and not equally long for all."""
    (Path(folder) / f"loaded-{os.environ['RANK']}").touch()
    until = time.monotonic() + 60
    while (
        len(list(Path(folder).glob("loaded-*"))) < int(os.environ["WORLD_SIZE"]) and time.monotonic() < until
    ):
        time.sleep(0.01)


wait_for_the_others()
reached("init")
# Hosts of different names meet over TCP.
apart = f"host{os.environ['RANK']}" if "PACELINE_TEST_APART" in os.environ else None
job = paceline.init(timeout_s=float(deadline), host=apart)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
data = TensorDataset(torch.randn(300, 4), torch.randn(300, 1))
loader = DataLoader(data, batch_size=5)
reached("prepare")
model, optimizer, loader = job.prepare(model, optimizer, loader, strategy=strategy)
for epoch in job.epochs(3):
    for number, (x, y) in enumerate(loader):
        if (epoch, number) == (1, 3):
            reached("train")
        loss = ((model(x) - y) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if epoch == 1:
        reached("evaluate")
    job.evaluate(model, data, {"loss": metric})
reached("save")
job.save(Path(folder) / "checkpoint")
if phase == "close" and os.environ["RANK"] == victim:
    job.logbook.close = act
print(f"rank {job.rank} is through", flush=True)
job.close()
