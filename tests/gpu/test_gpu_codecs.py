"""Codecs choose their kernels by where the tensor lies, and give the CPU's bytes for large tensors too."""

from __future__ import annotations

import sys

import pytest
import torch

from paceline import codecs
from paceline.codecs.kernel import device as device_codecs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SPECS = [
    "fp16",
    "bf16",
    "int8",
    "int8(stochastic=true)",
    "int4",
    "onebit",
    "threshold(density=0.001)",
    "threshold(density=0.01, entropy=true)",
    "topk(density=0.01)",
    "topk(density=0.001, entropy=true)",
]


@pytest.mark.parametrize("feedback", [False, True], ids=["plain", "error_feedback"])
@pytest.mark.parametrize("spec", SPECS)
def test_same_bytes_as_on_the_cpu(spec: str, feedback: bool) -> None:
    text = f"error_feedback(codec={spec})" if feedback else spec
    here, there = codecs.make(text), codecs.make(text)
    states: tuple[dict[str, object], dict[str, object]] = ({}, {})
    generator = torch.Generator().manual_seed(1)
    for numel in (1_234_567,):
        for _ in range(3):
            x = torch.randn(numel, generator=generator) * 1e-3
            a, b = here.encode(x, states[0]), there.encode(x.cuda(), states[1])
            assert b.is_cuda
            assert a.numpy().tobytes() == b.cpu().numpy().tobytes()
            for payload in (b, a):  # from the device, and from a message
                out, other = torch.ones(numel), torch.ones(numel, device="cuda")
                codecs.decode(a, out, accumulate=True)
                codecs.decode(payload, other, accumulate=True)
                assert torch.equal(out, other.cpu())
    if "residual" in states[0]:
        assert torch.equal(states[0]["residual"], states[1]["residual"].cpu())  # type: ignore[arg-type, attr-defined]
    assert "triton" in sys.modules


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    x = torch.randn(40, 50).to(dtype)
    codec = codecs.make("int8")
    a, b = codec.encode(x, {}), codec.encode(x.cuda(), {})
    assert a.numpy().tobytes() == b.cpu().numpy().tobytes()
    out = torch.ones(2000, 2, dtype=dtype, device="cuda")[:, 0]
    codec.decode(b, out, accumulate=True)
    expected = torch.ones(2000, dtype=dtype)
    codec.decode(a, expected, accumulate=True)
    assert torch.equal(out.cpu(), expected)


def test_a_tensor_of_more_than_2_to_30_elements() -> None:
    numel = 2**30 + 12_345
    x = torch.empty(numel, device="cuda").uniform_(-1, 1)
    for spec in ("int8", "onebit", "threshold(tau=0.999)"):
        codec = codecs.make(spec)
        out = torch.empty(numel, device="cuda")
        codec.decode(codec.encode(x, {}), out)
        if spec == "int8":
            assert float((out - x).abs().max()) <= 0.5 / 127 + 1e-6
        elif spec == "onebit":
            assert torch.equal(out.signbit(), x.signbit())
        else:
            assert torch.equal(out != 0, x.abs() >= 0.999)


def test_kernels_are_there() -> None:
    assert device_codecs.has_kernels(torch.device("cuda", 0))
