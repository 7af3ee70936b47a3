"""What workers run in these tests; imported by name in new processes, here and on an engine."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.utils.data import DataLoader

import paceline
from paceline.tasks.load import load

EPOCHS = 12
SPARK_SETTINGS = {
    "spark.cores.max": "2",
    "spark.executor.cores": "1",
    "spark.executor.memory": "600m",
    "spark.driver.host": "127.0.0.1",
    "spark.driver.bindAddress": "127.0.0.1",
    "spark.ui.enabled": "false",
    "spark.ui.showConsoleProgress": "false",
    "spark.log.level": "OFF",
    "spark.worker.timeout": "15",
}
STRATEGIES = ("all_reduce", "local_sgd(period=8)", "parameter_server")


def digest(model: torch.nn.Module) -> str:
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()


def train_digits(job: Any, strategy: str, epochs: int, *, on_step: Any = lambda step: None) -> dict[str, Any]:
    """Train the digits task; returns the final accuracy and a digest of the parameters."""
    torch.manual_seed(0)
    task = load("digits")
    for group in task.optimizer.param_groups:
        group["lr"] = 0.03
    loader: Any = DataLoader(task.train_set, batch_size=32, shuffle=True)
    model, optimizer, loader = job.prepare(
        task.model, task.optimizer, loader, strategy=strategy, batch="global"
    )
    for epoch in job.epochs(epochs):
        for group in task.optimizer.param_groups:  # small at the end: asynchronous runs settle
            group["lr"] = 0.03 if epoch < epochs // 2 else 0.003
        for step, (x, y) in enumerate(loader):
            on_step(step)
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        if job.checkpoint is not None:
            job.save(job.checkpoint)
    tested = job.evaluate(model, task.test_set, metrics=task.metrics)["accuracy"]
    # All 1797 digits: one of the 360 for testing alone is more than a quarter of a point.
    everything = torch.utils.data.ConcatDataset([task.train_set, task.test_set])
    accuracy = job.evaluate(model, everything, metrics=task.metrics)["accuracy"]
    return {
        "accuracy": float(accuracy),
        "tested": float(tested),
        "digest": digest(model),
        "rank": job.rank,
    }


def all_strategies(epochs: int) -> dict[str, dict[str, Any]]:
    """The same training by each strategy, in one job."""
    job = paceline.init(seed=0)
    results = {strategy: train_digits(job, strategy, epochs) for strategy in STRATEGIES}
    job.close()
    return results


def with_a_kill(epochs: int, victim: int, marker: str) -> dict[str, Any]:
    """On the first attempt, rank 1 kills a process with SIGKILL in the middle of the third epoch.

    `victim`: how many generations above the worker; 0 is the worker itself, 1 the process of the engine.
    """
    job = paceline.init(seed=0)

    def kill_once(step: int) -> None:
        if job.rank == 1 and job.epoch == 2 and step == 10 and victim >= 0 and not Path(marker).exists():
            Path(marker).write_text(str(os.getpid()))
            pid = os.getpid()
            for _ in range(victim):
                pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            os.kill(pid, signal.SIGKILL)
            time.sleep(60)  # the guard ends this process too

    result = train_digits(job, "all_reduce", epochs, on_step=kill_once)
    job.close()
    return {**result, "restarts": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))}


def raise_on_rank_1() -> None:
    job = paceline.init()
    job.barrier()
    if job.rank == 1:
        raise KeyError("boom")
    time.sleep(120)


def environment() -> tuple[str, str, str]:
    return os.getcwd(), os.environ.get("COLOUR", ""), os.environ["OMP_NUM_THREADS"]
