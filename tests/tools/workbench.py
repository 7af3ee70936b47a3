"""Strategies without a training loop: flat parameters, updates or gradients made up by the test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from paceline.comm import current
from paceline.comm.simulated.simulate import SimulatedRun, simulate
from paceline.strategies.base.strategy import TrainingStrategy, make

NETWORK = "ethernet(gbit=10, latency_us=5)"


class FlatModel:
    """What strategies see of a replica: flat parameters, nothing else."""

    def __init__(self, *parameters: torch.Tensor) -> None:
        self.parameters = list(parameters)
        self.gradients = [torch.zeros_like(p) for p in parameters]
        self.buckets: list[Any] = []
        self.weight, self.has_samples = 1.0, True

    def adopt(self) -> None:
        pass

    def optimizer_state(self) -> list[Any]:
        return []


Update = Callable[[int, int, torch.Tensor], torch.Tensor]
"""(rank, step, weights) → what the local optimizer adds"""


def quadratic(rank: int, step: int, weights: torch.Tensor) -> torch.Tensor:
    """SGD on ½(w − target)² with a target of its own on every rank and step."""
    target = torch.sin(torch.arange(weights.numel(), dtype=weights.dtype) * (rank + 1) + step)
    return -0.1 * (weights - target)


def train(
    strategy: str,
    *,
    num_workers: int,
    steps: int,
    update: Update = quadratic,
    numel: int = 10,
    dtype: torch.dtype = torch.float64,
    after: Callable[[int, TrainingStrategy], Any] | None = None,
    each_step: Callable[[int, int, TrainingStrategy], None] | None = None,
    **options: Any,
) -> SimulatedRun:
    """Run `steps` made-up minibatches per worker; every result is (final weights, stats, after(...))."""

    def worker() -> Any:
        comm = current.provided()
        model = FlatModel(torch.linspace(-1, 1, numel, dtype=dtype))
        method = make(strategy)
        if method.survives_loss:
            comm.tolerate_loss()
        method.attach(model, comm)
        for step in range(steps):
            comm.charge_compute()
            method.before_update()
            model.parameters[0].add_(update(comm.rank, step, model.parameters[0]))
            method.after_update()
            if each_step is not None:
                each_step(comm.rank, step, method)
        method.synchronize()
        extra = after(comm.rank, method) if after is not None else None
        return model.parameters[0].clone(), {**method.stats(), **comm.ledger.snapshot()}, extra

    options.setdefault("network", NETWORK)
    return simulate(worker, num_workers=num_workers, **options)


def continued_and_resumed(strategy: str, start: torch.Tensor) -> tuple[SimulatedRun, SimulatedRun]:
    """24 steps of four workers from `start`, without a pause and with a restart from a save in the middle.

    In simulation with constant compute times, so that both meet the same order of messages. Every result is
    the final weights.
    """

    def halves(is_restarted: bool) -> torch.Tensor:
        comm = current.provided()
        model, method = FlatModel(start.clone()), make(strategy)
        method.attach(model, comm)
        for step in range(24):
            if step == 12:
                comm.drain()
                saved = (method.state_dict(), model.parameters[0].clone())
                comm.barrier().wait()
                if is_restarted:
                    model, method = FlatModel(saved[1].clone()), make(strategy)
                    method.scope = "resumed"
                    method.attach(model, comm)
                    comm.barrier().wait()
                    method.load_state_dict(saved[0])
                comm.barrier().wait()
            comm.charge_compute()
            method.before_update()
            model.parameters[0].add_(quadratic(comm.rank, step, model.parameters[0]))
            method.after_update()
        method.synchronize()
        return model.parameters[0].clone()

    speeds = [1.0, 1.1, 0.9, 1.05]
    through, resumed = (
        simulate(halves, args=(is_restarted,), num_workers=4, speeds=speeds) for is_restarted in (False, True)
    )
    return through, resumed
