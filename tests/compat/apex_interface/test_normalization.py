"""Apex's layers of normalisation: torch's results, and the dtypes that Apex documents."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from paceline.compat.apex import normalization
from paceline.errors import ConfigError

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def filled(layer: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


@pytest.mark.parametrize("weights", DTYPES)
@pytest.mark.parametrize("inputs", DTYPES)
@pytest.mark.parametrize("shape", [6, (5, 6)])
def test_plain_forms_keep_the_inputs_dtype_and_mixed_forms_take_the_weights(
    shape: int | tuple[int, ...], inputs: torch.dtype, weights: torch.dtype
) -> None:
    x = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0)).to(inputs)
    for kind in ("LayerNorm", "RMSNorm"):
        for prefix, dtype in (("Fused", inputs), ("MixedFused", weights)):
            layer = filled(getattr(normalization, prefix + kind)(shape)).to(weights)
            wide = filled(getattr(nn, kind)(shape, eps=1e-5))
            wide.load_state_dict({k: v.float() for k, v in layer.state_dict().items()})
            result = layer(x)
            assert result.dtype == dtype
            eps = max(torch.finfo(d).eps for d in (inputs, weights))
            torch.testing.assert_close(result.float(), wide(x.float()), rtol=4 * eps, atol=4 * eps)
            result.float().square().sum().backward()
            assert layer.weight.grad is not None
            assert layer.weight.grad.dtype == weights


def test_rms_is_the_root_of_the_mean_square_plus_epsilon() -> None:
    x = torch.tensor([[3.0, 4.0]])
    layer = normalization.FusedRMSNorm(2, eps=0.5)
    torch.testing.assert_close(layer(x), x / (12.5 + 0.5) ** 0.5)
    assert [n for n, _ in layer.named_parameters()] == ["weight"]


@pytest.mark.parametrize("kind", ["FusedLayerNorm", "FusedRMSNorm"])
def test_without_a_weight(kind: str) -> None:
    layer = getattr(normalization, kind)(4, elementwise_affine=False, memory_efficient=True)
    x = torch.randn(2, 4)
    assert not list(layer.parameters())
    torch.testing.assert_close(layer(x), filled_reference(kind, x))
    mixed = getattr(normalization, f"Mixed{kind}")
    with pytest.raises(ConfigError, match=kind):
        mixed(4, elementwise_affine=False)
    with pytest.warns(UserWarning, match="no effect"):
        mixed(4, elementwise_affine=True)
    with pytest.raises(ConfigError, match="unknown"):
        mixed(4, nonsense=1)


def filled_reference(kind: str, x: torch.Tensor) -> torch.Tensor:
    if kind == "FusedRMSNorm":
        return functional.rms_norm(x, [4], eps=1e-5)
    return functional.layer_norm(x, [4])


def test_functions_equal_the_layers() -> None:
    x, w, b = torch.randn(2, 4), torch.randn(4), torch.randn(4)
    n, wide = normalization, functional.layer_norm(x, [4], w, b, 1e-6)
    torch.testing.assert_close(n.fused_layer_norm_affine(x, w, b, 4), wide)
    mixed = n.mixed_dtype_fused_layer_norm_affine(x, w.bfloat16(), b.bfloat16(), 4)
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(n.fused_layer_norm(x, (4,)), functional.layer_norm(x, [4], eps=1e-6))
    torch.testing.assert_close(n.fused_rms_norm(x, 4), functional.rms_norm(x, [4], eps=1e-6))
    torch.testing.assert_close(n.fused_rms_norm_affine(x, w, 4), functional.rms_norm(x, [4], w, 1e-6))
    assert n.mixed_dtype_fused_rms_norm_affine(x, w.bfloat16(), 4).dtype == torch.bfloat16
