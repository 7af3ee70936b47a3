"""The C++ kernels against the readable PyTorch versions: same bytes, same residuals, same decoded values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from codec_inputs import half_ties, halves, inputs, nearly_infinite, with_special_values

from paceline import _core, codecs
from paceline.codecs.kernel import payload

SPECS = [
    "fp16",
    "fp16(block=32)",
    "bf16",
    "int8",
    "int8(block=64, stochastic=true, seed=7)",
    "int4",
    "int4(block=32, stochastic=true)",
    "onebit",
    "onebit(block=32)",
    "threshold(tau=0.02)",
    "threshold(tau=0.5, entropy=true)",
    "threshold(tau=2.0, entropy=true)",
    "threshold(density=0.01)",
    "topk(density=0.05)",
    "topk(k=3, entropy=true)",
    "topk(density=0.02, entropy=true)",
]
SIZES = [0, 1, 2, 15, 16, 17, 31, 33, 100, 511, 512, 513, 1000, 4096, 4097, 9001]


@pytest.fixture(params=[0, 1, 2], ids=["baseline", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> Iterator[int]:
    _core.codec_limit_isa(request.param)
    if _core.codec_isa() != request.param:
        _core.codec_limit_isa(2)
        pytest.skip("this CPU does not have it")
    yield request.param
    _core.codec_limit_isa(2)


def encode_both(spec: str, x: torch.Tensor, feedback: bool, steps: int = 3) -> None:
    text = f"error_feedback(codec={spec})" if feedback else spec
    native, reference = codecs.make(text), codecs.make(text, use_reference=True)
    states: list[dict[str, Any]] = [{}, {}]
    for _ in range(steps):
        a, b = native.encode(x, states[0]), reference.encode(x, states[1])
        assert a.numpy().tobytes() == b.numpy().tobytes()
        assert a.numel() <= native.max_encoded_bytes(x.numel())
        if not reference.is_sparse:
            assert a.numel() == native.max_encoded_bytes(x.numel())
        for accumulate in (False, True):
            out_a, out_b = torch.full_like(x, 0.25), torch.full_like(x, 0.25)
            native.decode(a, out_a, accumulate=accumulate)
            reference.decode(b, out_b, accumulate=accumulate)
            assert torch.equal(out_a.nan_to_num(nan=1e30), out_b.nan_to_num(nan=1e30))
        if "residual" in states[0]:
            assert torch.equal(states[0]["residual"], states[1]["residual"])
            assert states[0]["residual"].isfinite().all()
        x = x * 0.7


@pytest.mark.parametrize("feedback", [False, True], ids=["plain", "error_feedback"])
@pytest.mark.parametrize("spec", SPECS)
def test_same_bytes(spec: str, feedback: bool, isa: int) -> None:
    for seed, numel in enumerate(SIZES):
        encode_both(spec, inputs(numel, seed), feedback)


@pytest.mark.parametrize("spec", SPECS)
def test_same_bytes_for_extreme_values(spec: str, isa: int) -> None:
    for numel in (40, 600, 1025):
        x = with_special_values(numel)
        encode_both(spec, x, feedback=True)
        encode_both(spec, x, feedback=False)
        encode_both(spec, torch.zeros(numel), feedback=True)
        encode_both(spec, nearly_infinite(numel), feedback=False, steps=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_encoded_as_float32(dtype: torch.dtype) -> None:
    x = inputs(1000, 1).to(dtype)
    codec = codecs.make("int8")
    payload = codec.encode(x.view(20, 50), {})
    out, widened = torch.empty_like(x), torch.empty(1000)
    codec.decode(payload, out)
    codecs.decode(payload, widened)
    assert torch.equal(out, widened.to(dtype))
    not_contiguous = torch.ones(1000, 2, dtype=dtype)[:, 0]
    codec.decode(payload, not_contiguous, accumulate=True)
    assert torch.allclose(not_contiguous.double(), 1 + widened.double(), atol=1e-1)


def test_rounding_of_every_half_between_two_halves(isa: int) -> None:
    ties = half_ties()
    for x in (ties, -ties, torch.nextafter(ties, torch.tensor(9e9)), halves()):
        encode_both(
            "fp16(block=64)",
            x[torch.randperm(x.numel(), generator=torch.Generator().manual_seed(0))],
            False,
            1,
        )


def test_decode_goes_through_unaligned_payloads(isa: int) -> None:
    x = inputs(1000, 2)
    for spec in SPECS:
        codec = codecs.make(spec)
        payload = codec.encode(x, {})
        shifted = torch.empty(payload.numel() + 1, dtype=torch.uint8)[1:].copy_(payload)
        a, b = torch.empty(1000), torch.empty(1000)
        codec.decode(payload, a)
        codec.decode(shifted, b)
        assert torch.equal(a, b), spec
        room = torch.empty(codec.max_encoded_bytes(1000) + 3, dtype=torch.uint8)[3:]
        assert torch.equal(codec.encode(x, {}, out=room), payload), spec


@pytest.mark.parametrize("codec", payload.NUMBERS)
def test_the_largest_payload_is_as_large_as_the_kernel_says(codec: str) -> None:
    for numel in (0, 1, 15, 16, 17, 31, 32, 33, 511, 512, 513, 100_000, 2**31 - 1):
        for parameter in (32, 512, 4096):
            expected = _core.codec_max_bytes(codec, numel, parameter)
            assert payload.max_bytes(codec, numel, parameter) == expected, (numel, parameter)
