"""Kernels for tensors on a GPU against the C++ ones: same payloads, same residuals, same decoded values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from codec_inputs import half_ties, inputs, nearly_infinite, with_special_values

from paceline import codecs
from paceline.codecs.kernel import device as device_codecs
from paceline.codecs.kernel import payload
from paceline.codecs.kernel.compiled import KernelCodec
from paceline.errors import ProtocolError

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
    "threshold(tau=2.0)",
    "topk(density=0.05)",
    "topk(k=3)",
]
SIZES = [0, 1, 17, 33, 511, 4096, 5001]


def made(spec: str) -> KernelCodec:
    codec = codecs.make(spec)
    assert isinstance(codec, KernelCodec)
    return codec


def compare(spec: str, x: torch.Tensor, device: torch.device, feedback: bool, steps: int = 2) -> None:
    """Both encode `steps` times, with their own residuals; everything must agree bit by bit."""
    codec, state = made(spec), {}  # type: ignore[var-annotated]
    keeps = feedback or spec.startswith("threshold")
    ours, theirs = (torch.zeros(x.numel(), device=d) if keeps else None for d in (device, "cpu"))
    for _ in range(steps):
        arguments = codec.arguments(x, state)
        twin: dict[str, Any] = {**state, "step": state.get("step", 1) - 1}
        expected = codec.encode_with_residual(x, theirs, twin)
        capacity = codec.max_encoded_bytes(x.numel())
        got, header, _ = device_codecs.encode(codec.name, x.to(device), ours, arguments, capacity=capacity)
        assert got.cpu().numpy().tobytes() == expected.numpy().tobytes()
        assert header == payload.read(expected.numpy().tobytes())
        if ours is not None and theirs is not None:
            assert torch.equal(ours.cpu(), theirs)
        for accumulate in (False, True):
            a = torch.full_like(x, 0.25)
            b = a.to(device)
            codec.decode(expected, a, accumulate=accumulate)
            device_codecs.decode(expected, header, b, accumulate=accumulate)
            assert torch.equal(a.nan_to_num(nan=1e30), b.cpu().nan_to_num(nan=1e30))
        x = x * 0.7


@pytest.mark.parametrize("feedback", [False, True], ids=["plain", "error_feedback"])
@pytest.mark.parametrize("spec", SPECS)
def test_same_bytes(spec: str, feedback: bool, device: torch.device) -> None:
    for seed, numel in enumerate(SIZES):
        compare(spec, inputs(numel, seed), device, feedback)


@pytest.mark.parametrize("spec", SPECS)
def test_same_bytes_for_extreme_values(spec: str, device: torch.device) -> None:
    for numel in (40, 1025):
        x = with_special_values(numel)
        compare(spec, x, device, feedback=True)
        compare(spec, x, device, feedback=False)
        compare(spec, torch.zeros(numel), device, feedback=True, steps=1)
        compare(spec, nearly_infinite(numel), device, feedback=False, steps=1)
        compare(spec, x * 1e-38, device, feedback=True, steps=1)  # blocks of denormals


@pytest.mark.parametrize("block", [32, 64])
def test_rounding_of_every_half_between_two_halves(block: int, device: torch.device) -> None:
    ties = half_ties()
    order = torch.randperm(ties.numel(), generator=torch.Generator().manual_seed(0))
    for x in (ties, -ties, torch.nextafter(ties, torch.tensor(9e9))):
        compare(f"fp16(block={block})", x[order], device, feedback=False, steps=1)


def test_equal_magnitudes_are_taken_from_the_front(device: torch.device) -> None:
    x = torch.ones(5000)
    x[::3] = -1.0
    x[4000] = 2.0
    compare("topk(density=0.1)", x, device, feedback=True)


@pytest.mark.parametrize("kind", ["normal", "equal", "misleading sample", "mostly zero"])
def test_topk_does_not_depend_on_its_sample(
    kind: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from paceline.codecs.kernel.device import topk

    monkeypatch.setattr(topk, "_SAMPLE", 32)
    topk._places.cache_clear()
    x = inputs(3001, 1)
    if kind == "equal":
        x = torch.ones(3001)
    elif kind == "misleading sample":
        x[topk._places(3001, torch.device("cpu"))] = 100.0
    elif kind == "mostly zero":
        x[torch.arange(3001) % 500 != 0] = 0.0
    compare("topk(density=0.1)", x, device, feedback=True)
    compare("topk(density=0.1)", x, device, feedback=False, steps=1)
    topk._places.cache_clear()


@pytest.mark.parametrize("spec", SPECS)
def test_any_alignment(spec: str, device: torch.device) -> None:
    """Payloads start at any byte of a message, tensors at any element."""
    codec, numel = made(spec), 1003
    x = torch.empty(numel + 1)[1:].copy_(inputs(numel, 2))
    residual = torch.zeros(numel)
    on_device = torch.empty(numel + 1, device=device)[1:].copy_(x)
    state: dict[str, Any] = {}
    arguments = codec.arguments(x, state)
    capacity = codec.max_encoded_bytes(numel)
    room = torch.empty(capacity + 3, dtype=torch.uint8, device=device)[3:]
    rest = torch.zeros(numel, device=device)
    got, header, _ = device_codecs.encode(codec.name, on_device, rest, arguments, capacity=capacity, out=room)
    expected = codec.encode_with_residual(x, residual, {"step": 0})
    assert got.data_ptr() == room.data_ptr()
    assert got.cpu().numpy().tobytes() == expected.numpy().tobytes()
    shifted = torch.empty(got.numel() + 1, dtype=torch.uint8, device=device)[1:].copy_(got)
    out, reference = torch.zeros(numel, device=device), torch.zeros(numel)
    device_codecs.decode(shifted, header, out)
    codec.decode(expected, reference)
    assert torch.equal(out.cpu(), reference)


def test_checksum(device: torch.device) -> None:
    codec = made("int8")
    codec.set_options(checksum=True)
    x = inputs(700, 1)
    expected = codec.encode(x, {})
    got, _, _ = device_codecs.encode(
        "int8", x.to(device), None, {"parameter": 256}, capacity=expected.numel(), has_checksum=True
    )
    assert got.cpu().numpy().tobytes() == expected.numpy().tobytes()
    assert device_codecs.read_header(got).has_checksum
    got[40] ^= 1
    with pytest.raises(ProtocolError, match="CRC-32C"):
        device_codecs.read_header(got)


def words(header: payload.PayloadHeader, values: list[int]) -> torch.Tensor:
    body = torch.tensor(values, dtype=torch.int64).to(torch.int32).view(torch.uint8)
    head = payload.as_tensor(payload.join(header, b""), torch.uint8)
    return torch.cat([head, body])


@pytest.mark.parametrize(
    ("values", "numel"), [([3, 3], 100), ([5, 2], 100), ([3, 100], 100), ([3, 2**31 + 99, 100], 101)]
)
def test_indexes_out_of_order_or_bounds_are_refused(
    values: list[int], numel: int, device: torch.device
) -> None:
    header = payload.PayloadHeader("threshold", numel, scale=0.5, count=len(values))
    out = torch.full((numel,), 7.0, device=device)
    if values == [3, 2**31 + 99, 100]:  # a sign is no part of the index: this one is fine
        device_codecs.decode(words(header, values), header, out)
        assert out.nonzero().view(-1).tolist() == [3, 99, 100]
        return
    with pytest.raises(ProtocolError):
        device_codecs.decode(words(header, values), header, out)
    sparse = payload.PayloadHeader("topk", numel, count=len(values))
    with pytest.raises(ProtocolError):
        device_codecs.decode(words(sparse, [0] * len(values) + values), sparse, out)
    assert bool((out == 7.0).all())


@pytest.mark.parametrize(
    ("groups", "count"), [([0x10001], 2), ([1], 2), ([0x8], 1), ([0x80000], 1), ([-0x80000000], 1)]
)
def test_bitmaps_that_lie_are_refused(groups: list[int], count: int, device: torch.device) -> None:
    header = payload.PayloadHeader("threshold", 3, layout=payload.BITMAP, scale=0.5, count=count)
    out = torch.full((3,), 7.0, device=device)
    with pytest.raises(ProtocolError):
        device_codecs.decode(words(header, groups), header, out)
    assert bool((out == 7.0).all())


@pytest.mark.parametrize(
    "spec", ["fp16", "bf16", "int8", "int4", "onebit", "threshold(tau=0.1)", "topk(k=9)"]
)
def test_bodies_of_the_wrong_length_are_refused(spec: str, device: torch.device) -> None:
    codec = made(spec)
    encoded = codec.encode_with_residual(inputs(300, 1), torch.zeros(300), {})
    header = payload.read(encoded.numpy().tobytes())
    out = torch.full((300,), 7.0, device=device)
    for wrong in (encoded[:-4], torch.cat([encoded, encoded[:4]])):
        with pytest.raises(ProtocolError):
            device_codecs.decode(wrong.contiguous(), header, out)
    assert bool((out == 7.0).all())
