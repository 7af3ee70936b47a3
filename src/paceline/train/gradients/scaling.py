"""A gradient's way into its bucket: times the weight of this rank."""

from __future__ import annotations

import torch

from paceline import core

LARGE_NUMEL = 1 << 18
"""A megabyte: the copy would only push out of the caches what backward needs next."""


def scale(view: torch.Tensor, gradient: torch.Tensor, weight: float) -> None:
    """`view` = `gradient` · `weight`; both are dense."""
    is_plain = gradient.dtype is torch.float32 and gradient.is_cpu and gradient.stride() == view.stride()
    is_large = view.dtype is torch.float32 and gradient.numel() >= LARGE_NUMEL
    if core.module is not None and is_plain and is_large:
        core.module.scale(view.data_ptr(), gradient.data_ptr(), gradient.numel(), weight)
    else:
        torch.mul(gradient, weight, out=view)
