"""A model's forward under autocast, with the scale of losses between its outputs and its parameters.

For fp16, gradients are multiplied by the scale where they enter the model, at its outputs, and divided by it
where they leave: at its inputs and at its parameters. Inside they are large enough for float16; outside
nobody sees the scale: not another model, not a regulariser on parameters, not `torch.autograd.grad`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils import stateless
from torch.utils import _pytree as pytree

# mypy: disable-error-code="no-untyped-call, no-any-return, misc"

Context = Any
"""torch's context of an autograd function."""


class _Scaled(torch.autograd.Function):
    """The value itself; its gradient is multiplied by what `factor()` is then."""

    @staticmethod
    def forward(ctx: Context, value: torch.Tensor, factor: Callable[[], float]) -> torch.Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Context, gradient: torch.Tensor) -> Any:
        return _Times.apply(gradient, ctx.factor()), None


class _Times(torch.autograd.Function):
    """gradient · factor. A gradient of that is left as it is.

    It enters the model's backward as gradients enter its forward: it is scaled inside, and unscaled where it
    leaves. Multiplied here as well, it would leave with the scale squared.
    """

    @staticmethod
    def forward(ctx: Context, gradient: torch.Tensor, factor: float) -> torch.Tensor:
        return gradient * factor

    @staticmethod
    def backward(ctx: Context, gradient: torch.Tensor) -> Any:
        return gradient, None


class LowPrecisionForward:
    """Stands on a module in place of its `forward`; a copy of the module has a copy, without the scale.

    Args:
        module: The module.
        dtype: That of autocast.
        scale: Gives the current scale of losses; None: gradients are not scaled.
    """

    def __init__(
        self, module: nn.Module, dtype: torch.dtype, scale: Callable[[], float] | None = None
    ) -> None:
        self.module, self.dtype, self.scale = module, dtype, scale
        self.inner = vars(module).get("forward")  # what had been put there before
        self.device = next((p.device.type for p in module.parameters()), "cpu")

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if self.scale is None or not torch.is_grad_enabled():
            return pytree.tree_map(_single, self._forward(*arguments, **named))
        scale = self.scale

        def enters(tensor: Any) -> Any:
            return _Scaled.apply(tensor, scale) if _has_gradient(tensor) else tensor

        def leaves(tensor: Any) -> Any:
            return _Scaled.apply(tensor, lambda: 1 / scale()) if _has_gradient(tensor) else tensor

        given, more = pytree.tree_map(leaves, (arguments, named))
        parameters = {name: leaves(p) for name, p in _all_parameters(self.module)}
        with stateless._reparametrize_module(self.module, parameters):  # noqa: SLF001  `functional_call` would call hooks twice
            outputs = self._forward(*given, **more)
        return pytree.tree_map(lambda output: enters(_single(output)), outputs)

    def _forward(self, *arguments: Any, **named: Any) -> Any:
        with torch.autocast(self.device, self.dtype):
            return self.__wrapped__(*arguments, **named)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The module's own, for the call and for `inspect.signature`."""
        if self.inner is not None:
            return self.inner
        return type(self.module).forward.__get__(self.module)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "scale": None}


def _all_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Tied parameters under each of their names, but each module once: replaced twice, it would stay so."""
    for prefix, one in module.named_modules():
        yield from one.named_parameters(prefix, recurse=False, remove_duplicate=False)


def _single(output: Any) -> Any:
    """Losses are computed in float32 at least."""
    if isinstance(output, torch.Tensor) and output.dtype in (torch.float16, torch.bfloat16):
        return output.float()
    return output


def _has_gradient(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and tensor.requires_grad
