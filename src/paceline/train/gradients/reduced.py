"""A reduced gradient that can be differentiated again, after backward(create_graph=True)."""

from __future__ import annotations

from typing import Any

import torch

# mypy: disable-error-code="no-untyped-call, misc"


class Reduced(torch.autograd.Function):
    """(this rank's gradient, all ranks') -> all ranks', as if it depended on this rank's alone.

    Each rank then has its own part of the derivative; these parts are weighted and added up over the ranks as
    all gradients are.
    """

    @staticmethod
    def forward(ctx: Any, own: torch.Tensor, reduced: torch.Tensor) -> torch.Tensor:
        return reduced.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None
