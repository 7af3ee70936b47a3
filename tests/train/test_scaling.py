"""Gradients on their way into the flat buffer: the same numbers however large they are."""

from __future__ import annotations

import pytest
import torch

from paceline.train.gradients.scaling import LARGE_NUMEL, scale


@pytest.mark.parametrize("numel", [1, LARGE_NUMEL - 1, LARGE_NUMEL, LARGE_NUMEL + 37])
@pytest.mark.parametrize("offset", [0, 1, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_scaling_is_multiplication(numel: int, offset: int, dtype: torch.dtype) -> None:
    gradient = torch.randn(numel, generator=torch.Generator().manual_seed(numel)).to(dtype)
    room = torch.full((numel + 64,), 7.0, dtype=dtype)
    scale(room[offset : offset + numel], gradient, 1 / 3)
    assert torch.equal(room[offset : offset + numel], gradient * (1 / 3))
    assert torch.all(room[:offset] == 7) and torch.all(room[offset + numel :] == 7), "nothing beside it"


def test_layouts_other_than_the_views_are_kept_apart() -> None:
    gradient = torch.randn(1024, 512).t()
    view = torch.empty(512, 1024)
    scale(view, gradient, 0.25)
    assert torch.equal(view, gradient * 0.25)
