"""int8 and int4 with one float scale per block: kernels for the formats in codecs/int8.py and int4.py."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from paceline.codecs.kernel import payload
from paceline.codecs.kernel.device.arithmetic import (
    added,
    decode_scaled,
    launch_by_blocks,
    magnitude_of,
    mixed,
    remainder,
)
from paceline.codecs.kernel.payload import PayloadHeader


def encode_int8(
    x: torch.Tensor, residual: torch.Tensor | None, body: torch.Tensor, arguments: dict[str, Any]
) -> tuple[PayloadHeader, int, int]:
    """Write the body; see `device.encode`."""
    return _encode("int8", _encode_int8, x, residual, body, arguments)


def encode_int4(
    x: torch.Tensor, residual: torch.Tensor | None, body: torch.Tensor, arguments: dict[str, Any]
) -> tuple[PayloadHeader, int, int]:
    """Write the body; see `device.encode`."""
    return _encode("int4", _encode_int4, x, residual, body, arguments)


def decode_int8(header: PayloadHeader, body: torch.Tensor, out: torch.Tensor, accumulate: bool) -> None:
    """Store or add what the body holds; see `device.decode`."""
    _decode(decode_scaled, header, body, out, tl.int8, accumulate)


def decode_int4(header: PayloadHeader, body: torch.Tensor, out: torch.Tensor, accumulate: bool) -> None:
    """Store or add what the body holds; see `device.decode`."""
    _decode(_decode_int4, header, body, out, accumulate)


def _code_bytes(codec: str, numel: int) -> int:
    return numel if codec == "int8" else 16 * payload.num_blocks(numel, 32)


def _encode(
    codec: str,
    kernel: Any,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    body: torch.Tensor,
    arguments: dict[str, Any],
) -> tuple[PayloadHeader, int, int]:
    block, key = arguments["parameter"], arguments.get("key", 0)
    blocks = payload.num_blocks(x.numel(), block)
    signed = [half - (1 << 32) if half >> 31 else half for half in (key & 0xFFFFFFFF, key >> 32)]
    has_residual, is_stochastic = residual is not None, bool(arguments.get("stochastic"))
    launch_by_blocks(
        kernel,
        x.numel(),
        block,
        x,
        residual,
        body,
        x.numel(),
        blocks,
        *signed,
        has_residual,
        is_stochastic,
    )
    return PayloadHeader(codec, x.numel(), parameter=block), 4 * blocks + _code_bytes(codec, x.numel()), 0


def _decode(
    kernel: Any, header: PayloadHeader, body: torch.Tensor, out: torch.Tensor, *choices: object
) -> None:
    block = payload.check_block(header)
    blocks = payload.num_blocks(header.numel, block)
    payload.check_body_bytes(header, body.numel(), 4 * blocks + _code_bytes(header.codec, header.numel))
    launch_by_blocks(kernel, header.numel, block, body, out, header.numel, blocks, *choices)


@triton.jit
def _scales(largest, LIMIT: tl.constexpr):
    """Bits of the scale that is sent, and 1 / scale: 0 for a block that is sent as zeros or as NaN."""
    is_finite = largest < 0x7F800000
    limit = tl.full(largest.shape, LIMIT, tl.float32)
    scale = tl.div_rn(largest.to(tl.float32, bitcast=True), limit)
    bits = scale.to(tl.int32, bitcast=True)
    is_zero = (bits < 0x00800000) | (largest >= 0x7F800000)
    one = tl.full(largest.shape, 1.0, tl.float32)
    inverse = tl.where(is_zero, 0.0, tl.div_rn(one, tl.where(is_zero, one, scale)))
    sent = tl.where(is_finite, tl.where(is_zero, 0, bits), 0x7FC00000)
    return sent, inverse


@triton.jit
def _codes(value, inverse, index, key_low, key_high, LIMIT: tl.constexpr, STOCHASTIC: tl.constexpr):
    """round(value · inverse), or floor(value · inverse + u) with u decided by key and index."""
    scaled = value * inverse
    if STOCHASTIC:
        counter = (index // 32) * 16 + index % 16
        bits = mixed(mixed(counter.to(tl.uint32) + key_low.to(tl.uint32)) ^ key_high.to(tl.uint32))
        half = tl.where(index % 32 < 16, bits & 0xFFFF, bits >> 16).to(tl.int32)
        uniform = half.to(tl.float32) * (1.0 / 65536) + (1.0 / 131072)
        code = tl.floor(scaled + uniform).to(tl.int32)
        code = tl.minimum(tl.maximum(code, -LIMIT), LIMIT)
    else:
        # 1.5 · 2^23 pushes the fraction out of the mantissa: the hardware rounds to nearest even.
        code = (scaled + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
    return tl.where(inverse == 0.0, 0, code)


@triton.jit(do_not_specialize=["key_low", "key_high"])
def _encode_int8(
    x,
    residual,
    body,
    numel,
    blocks,
    key_low,
    key_high,
    HAS_RESIDUAL: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    base = tl.program_id(0).to(tl.int64) * (ROWS * BLOCK)
    row = tl.arange(0, ROWS)
    index = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = index < numel - base
    value = tl.load(x + base + index, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        old = tl.load(residual + base + index, mask=inside, other=0.0)
        value = added(value, old)
    scale, inverse = _scales(tl.max(magnitude_of(value), axis=1), 127)
    code = _codes(value, inverse[:, None], base + index, key_low, key_high, 127, STOCHASTIC)
    tl.store(body.to(tl.pointer_type(tl.int32)) + base // BLOCK + row, scale, mask=row * BLOCK < numel - base)
    codes = (body + 4 * blocks).to(tl.pointer_type(tl.int8)) + base
    tl.store(codes + index, code.to(tl.int8), mask=inside)
    if HAS_RESIDUAL:
        sent = code.to(tl.float32) * scale.to(tl.float32, bitcast=True)[:, None]
        tl.store(residual + base + index, remainder(value, sent, old), mask=inside)


@triton.jit(do_not_specialize=["key_low", "key_high"])
def _encode_int4(
    x,
    residual,
    body,
    numel,
    blocks,
    key_low,
    key_high,
    HAS_RESIDUAL: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    base = tl.program_id(0).to(tl.int64) * (ROWS * BLOCK)
    row = tl.arange(0, ROWS)
    pair = row[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    low = pair // 16 * 32 + pair % 16  # byte i of a group holds elements i and i + 16
    high = low + 16
    left = numel - base
    value_low = tl.load(x + base + low, mask=low < left, other=0.0)
    value_high = tl.load(x + base + high, mask=high < left, other=0.0)
    if HAS_RESIDUAL:
        old_low = tl.load(residual + base + low, mask=low < left, other=0.0)
        old_high = tl.load(residual + base + high, mask=high < left, other=0.0)
        value_low = added(value_low, old_low)
        value_high = added(value_high, old_high)
    largest = tl.maximum(magnitude_of(value_low), magnitude_of(value_high))
    scale, inverse = _scales(tl.max(largest, axis=1), 7)
    code_low = _codes(value_low, inverse[:, None], base + low, key_low, key_high, 7, STOCHASTIC)
    code_high = _codes(value_high, inverse[:, None], base + high, key_low, key_high, 7, STOCHASTIC)
    tl.store(body.to(tl.pointer_type(tl.int32)) + base // BLOCK + row, scale, mask=row * BLOCK < left)
    packed = (code_low + 8) | ((code_high + 8) << 4)
    codes = body + 4 * blocks + base // 2
    tl.store(codes + pair, packed.to(tl.uint8), mask=low // 32 * 32 < left)
    if HAS_RESIDUAL:
        scales = scale.to(tl.float32, bitcast=True)[:, None]
        rest = remainder(value_low, code_low.to(tl.float32) * scales, old_low)
        tl.store(residual + base + low, rest, mask=low < left)
        rest = remainder(value_high, code_high.to(tl.float32) * scales, old_high)
        tl.store(residual + base + high, rest, mask=high < left)


@triton.jit
def _decode_int4(body, out, numel, blocks, ACCUMULATE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    base = tl.program_id(0).to(tl.int64) * (ROWS * BLOCK)
    row = tl.arange(0, ROWS)
    pair = row[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    low = pair // 16 * 32 + pair % 16
    high = low + 16
    left = numel - base
    scales = body.to(tl.pointer_type(tl.float32)) + base // BLOCK
    scale = tl.load(scales + row, mask=row * BLOCK < left, other=0.0)[:, None]
    packed = tl.load(body + 4 * blocks + base // 2 + pair, mask=low < left, other=0).to(tl.int32)
    value_low = ((packed & 15) - 8).to(tl.float32) * scale
    value_high = ((packed >> 4) - 8).to(tl.float32) * scale
    if ACCUMULATE:
        value_low = tl.load(out + base + low, mask=low < left, other=0.0) + value_low
        value_high = tl.load(out + base + high, mask=high < left, other=0.0) + value_high
    tl.store(out + base + low, value_low, mask=low < left)
    tl.store(out + base + high, value_high, mask=high < left)
