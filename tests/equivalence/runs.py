"""A training loop run by one process and by several, and what must be equal afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import paceline
from paceline.comm.simulated.simulate import simulate
from paceline.train.job import Job

Loop = Callable[[Job], Any]


def on(size: int, loop: Loop, *, seed: int = 0) -> list[Any]:
    """What `loop` returns on each of `size` ranks, which are threads with a job of their own."""

    def body() -> Any:
        return loop(paceline.init(seed=seed))

    return list(simulate(body, num_workers=size))


def state(*things: Any) -> list[Any]:
    """Parameters, buffers and optimizer states as plain tensors, in order."""
    found: list[Any] = []
    for thing in things:
        if isinstance(thing, nn.Module):
            found += [t.detach().clone() for t in thing.state_dict().values() if isinstance(t, torch.Tensor)]
        elif isinstance(thing, torch.optim.Optimizer):
            for one in thing.state_dict()["state"].values():
                found += [_plain(one[key]) for key in sorted(one)]
        else:
            found.append(thing)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value.clone() if isinstance(value, torch.Tensor) else value


def assert_equal(ours: Any, one: Any, *, tolerance: float = 1e-9, where: str = "") -> None:
    """Equal structures of tensors and numbers, to a relative and absolute tolerance."""
    if isinstance(one, torch.Tensor):
        assert isinstance(ours, torch.Tensor), (where, ours, one)
        assert ours.shape == one.shape and ours.dtype == one.dtype, (where, ours, one)
        assert torch.allclose(ours, one, rtol=tolerance, atol=tolerance, equal_nan=True), (where, ours, one)
    elif isinstance(one, dict):
        assert list(ours) == list(one), (where, list(ours), list(one))
        for key in one:
            assert_equal(ours[key], one[key], tolerance=tolerance, where=f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(ours) == len(one), (where, len(ours), len(one))
        for i, (a, b) in enumerate(zip(ours, one, strict=True)):
            assert_equal(a, b, tolerance=tolerance, where=f"{where}[{i}]")
    elif isinstance(one, float) or isinstance(ours, float):
        assert isinstance(ours, (int, float)) and isinstance(one, (int, float)), (where, ours, one)
        assert abs(ours - one) <= tolerance * (1 + abs(one)), (where, ours, one)
    else:
        assert ours == one, (where, ours, one)


def same_as_one_process(loop: Loop, *, sizes: tuple[int, ...] = (2, 3), tolerance: float = 1e-9) -> None:
    """All ranks of every size return what one process returns."""
    (one,) = on(1, loop)
    for size in sizes:
        for rank, ours in enumerate(on(size, loop)):
            assert_equal(ours, one, tolerance=tolerance, where=f"rank {rank} of {size}: ")
