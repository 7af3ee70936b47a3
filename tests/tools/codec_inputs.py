"""Tensors on which the versions of a codec (C++, PyTorch, Triton) must agree bit by bit."""

from __future__ import annotations

import torch

SPECIAL = [
    torch.inf,
    -torch.inf,
    torch.nan,
    -torch.nan,
    3.4e38,
    -3.4e38,
    1e-38,
    -1e-45,
    1.4e-45,
    0.0,
    -0.0,
    65504,
    65520,
    6e-8,
]


def inputs(numel: int, seed: int) -> torch.Tensor:
    """Magnitudes from 1e-6 to 10 in runs of 64, some exact zeros of both signs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(numel, generator=generator)
    scale = 10.0 ** torch.randint(-6, 2, (numel // 64 + 1,), generator=generator).repeat_interleave(64)
    x = x * scale[:numel]
    if seed % 3 == 0 and numel > 4:
        x[torch.randint(0, numel, (numel // 4,), generator=generator)] = 0.0
        x[1] = -0.0
    return x


def with_special_values(numel: int) -> torch.Tensor:
    """`inputs` with infinities, NaN, denormals and the ends of float16 among them; at least 21 elements."""
    x = inputs(numel, numel)
    x[7 : 7 + len(SPECIAL)] = torch.tensor(SPECIAL)
    return x


def nearly_infinite(numel: int) -> torch.Tensor:
    """Finite float32 whose sum over a block is not; from half the largest number to the largest."""
    largest = torch.finfo(torch.float32).max
    signs = torch.where(torch.arange(numel) % 3 == 0, -1.0, 1.0)
    return signs * largest * torch.linspace(0.5, 1.0, max(1, numel))[:numel]


def halves() -> torch.Tensor:
    """Every finite non-negative float16, as float32."""
    return torch.arange(0, 0x7C00, dtype=torch.int16).view(torch.float16).to(torch.float32)


def half_ties() -> torch.Tensor:
    """The numbers halfway between two neighbours of `halves`: exact in float32."""
    return (halves()[1:] + halves()[:-1]) / 2
