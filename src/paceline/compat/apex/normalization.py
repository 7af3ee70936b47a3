"""`apex.normalization`: layer and RMS normalisation, computed in float32 whatever the dtypes.

The plain forms return the input's dtype, the mixed forms the weight's. `memory_efficient` has no effect.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from paceline.errors import ConfigError

__all__ = [
    "FusedLayerNorm",
    "FusedRMSNorm",
    "MixedFusedLayerNorm",
    "MixedFusedRMSNorm",
    "fused_layer_norm",
    "fused_layer_norm_affine",
    "fused_rms_norm",
    "fused_rms_norm_affine",
    "mixed_dtype_fused_layer_norm_affine",
    "mixed_dtype_fused_rms_norm_affine",
]
Shape = int | Sequence[int] | torch.Size


def fused_layer_norm_affine(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalized_shape: Shape,
    eps: float = 1e-6,
    memory_efficient: bool = False,
) -> Tensor:
    """Layer normalisation with weight and bias; the result has the input's dtype."""
    return _layer_norm(input, weight, bias, normalized_shape, eps).to(input.dtype)


def fused_layer_norm(
    input: Tensor, normalized_shape: Shape, eps: float = 1e-6, memory_efficient: bool = False
) -> Tensor:
    """Layer normalisation without weight and bias."""
    return _layer_norm(input, None, None, normalized_shape, eps).to(input.dtype)


def mixed_dtype_fused_layer_norm_affine(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    normalized_shape: Shape,
    eps: float = 1e-6,
    memory_efficient: bool = False,
) -> Tensor:
    """Layer normalisation with weight and bias; the result has the weight's dtype."""
    return _layer_norm(input, weight, bias, normalized_shape, eps).to(weight.dtype)


def fused_rms_norm_affine(
    input: Tensor,
    weight: Tensor | None,
    normalized_shape: Shape,
    eps: float = 1e-6,
    memory_efficient: bool = False,
) -> Tensor:
    """RMS normalisation with a weight; the result has the input's dtype."""
    return _rms_norm(input, weight, normalized_shape, eps).to(input.dtype)


def fused_rms_norm(
    input: Tensor, normalized_shape: Shape, eps: float = 1e-6, memory_efficient: bool = False
) -> Tensor:
    """RMS normalisation without a weight."""
    return _rms_norm(input, None, normalized_shape, eps).to(input.dtype)


def mixed_dtype_fused_rms_norm_affine(
    input: Tensor, weight: Tensor, normalized_shape: Shape, eps: float = 1e-6, memory_efficient: bool = False
) -> Tensor:
    """RMS normalisation with a weight; the result has the weight's dtype."""
    return _rms_norm(input, weight, normalized_shape, eps).to(weight.dtype)


class FusedLayerNorm(nn.LayerNorm):
    """torch's LayerNorm for inputs and parameters of any two dtypes.

    Args:
        normalized_shape: The last dimensions, over which statistics are taken.
        eps: Added to the variance; default 1e-5.
        elementwise_affine: Whether there are weight and bias; default yes.
        memory_efficient: Accepted.
    """

    def __init__(
        self,
        normalized_shape: Shape,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__(_shape(normalized_shape), eps, elementwise_affine)

    def forward(self, input: Tensor) -> Tensor:
        return fused_layer_norm_affine(input, self.weight, self.bias, self.normalized_shape, self.eps)


class FusedRMSNorm(nn.RMSNorm):
    """torch's RMSNorm for inputs and a weight of any two dtypes.

    Args:
        normalized_shape: The last dimensions, over which the mean square is taken.
        eps: Added to the mean square; default 1e-5.
        elementwise_affine: Whether there is a weight; default yes.
        memory_efficient: Accepted.
    """

    def __init__(
        self,
        normalized_shape: Shape,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__(_shape(normalized_shape), eps, elementwise_affine)

    def forward(self, input: Tensor) -> Tensor:
        return fused_rms_norm_affine(input, self.weight, self.normalized_shape, self.eps or 0.0)


class MixedFusedLayerNorm(FusedLayerNorm):
    """`FusedLayerNorm` whose result has the weight's dtype; it always has a weight."""

    def __init__(
        self, normalized_shape: Shape, eps: float = 1e-5, *, memory_efficient: bool = False, **kwargs: object
    ) -> None:
        _refuse_no_weight("MixedFusedLayerNorm", kwargs)
        super().__init__(normalized_shape, eps)

    def forward(self, input: Tensor) -> Tensor:
        return mixed_dtype_fused_layer_norm_affine(
            input, self.weight, self.bias, self.normalized_shape, self.eps
        )


class MixedFusedRMSNorm(FusedRMSNorm):
    """`FusedRMSNorm` whose result has the weight's dtype; it always has a weight."""

    def __init__(
        self, normalized_shape: Shape, eps: float = 1e-5, *, memory_efficient: bool = False, **kwargs: object
    ) -> None:
        _refuse_no_weight("MixedFusedRMSNorm", kwargs)
        super().__init__(normalized_shape, eps)

    def forward(self, input: Tensor) -> Tensor:
        assert self.weight is not None
        return mixed_dtype_fused_rms_norm_affine(input, self.weight, self.normalized_shape, self.eps or 0.0)


def _layer_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, normalized_shape: Shape, eps: float
) -> Tensor:
    if all(t is None or t.dtype == input.dtype for t in (weight, bias)):
        return functional.layer_norm(input, _shape(normalized_shape), weight, bias, eps)
    wide = [None if t is None else t.float() for t in (weight, bias)]
    return functional.layer_norm(input.float(), _shape(normalized_shape), wide[0], wide[1], eps)


def _rms_norm(input: Tensor, weight: Tensor | None, normalized_shape: Shape, eps: float) -> Tensor:
    if weight is None or weight.dtype == input.dtype == torch.float64:
        return functional.rms_norm(input, _shape(normalized_shape), weight, eps)
    return functional.rms_norm(input.float(), _shape(normalized_shape), weight.float(), eps)


def _shape(normalized_shape: Shape) -> list[int]:
    return [normalized_shape] if isinstance(normalized_shape, int) else list(normalized_shape)


def _refuse_no_weight(name: str, options: dict[str, object]) -> None:
    unknown = sorted(set(options) - {"elementwise_affine"})
    if unknown:
        raise ConfigError(f"{name}: unknown arguments {', '.join(unknown)}")
    if "elementwise_affine" in options:
        if not options["elementwise_affine"]:
            raise ConfigError(
                f"{name}(elementwise_affine=False): there is always a weight; "
                f"use {name.removeprefix('Mixed')}"
            )
        warnings.warn(f"{name}: elementwise_affine has no effect", stacklevel=3)
