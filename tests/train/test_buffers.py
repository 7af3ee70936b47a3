"""Buffers at the end of an epoch: statistics are averaged, constants stay as they are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from paceline.comm import current
from paceline.comm.simulated.simulate import simulate
from paceline.train.preparation import average_buffers


def averaged(size: int, own: Any) -> list[list[torch.Tensor]]:
    def body() -> list[torch.Tensor]:
        comm = current.provided()
        tensors = own(comm.rank)
        average_buffers(tensors, comm)
        return list(tensors)

    return list(simulate(body, num_workers=size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 3, 5, 7])
def test_equal_buffers_stay_bit_equal(size: int, dtype: torch.dtype) -> None:
    table = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = torch.full((3, 3), float("-inf"), dtype=dtype).triu(1)
    zeros = torch.tensor([0.0, -0.0], dtype=dtype)
    constants = [table, mask, zeros, torch.arange(5)]
    for found in averaged(size, lambda rank: copy.deepcopy(constants)):
        for before, after in zip(constants, found, strict=True):
            assert torch.equal(before, after)
            assert torch.equal(before.signbit(), after.signbit())


@pytest.mark.parametrize("size", [2, 3])
def test_others_become_their_mean(size: int) -> None:
    found = averaged(size, lambda rank: [torch.tensor([1.0, rank, 60_000.0]).half(), torch.tensor(rank)])
    for statistics, count in found:
        assert statistics.tolist() == [1.0, (size - 1) / 2, 60_000.0]
        assert count == 0  # counters are rank 0's
