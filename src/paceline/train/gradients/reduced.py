"""A reduced gradient that can be differentiated again, after backward(create_graph=True)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

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


def connect(own: Mapping[int, torch.Tensor], parameters: Sequence[nn.Parameter]) -> None:
    """What depends on a reduced gradient has a gradient itself.

    Args:
        own: This rank's gradients that have a graph, by the index of their parameter.
        parameters: Have the reduced gradients.
    """
    for index, gradient in own.items():
        parameter = parameters[index]
        if parameter.grad is not None:
            parameter.grad = Reduced.apply(gradient, parameter.grad)
