"""One sign bit per element and a mean magnitude per block: kernels for the format in codecs/onebit.py."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from paceline.codecs.kernel import payload
from paceline.codecs.kernel.device.arithmetic import (
    added,
    bfloat_of,
    launch_by_blocks,
    magnitude_of,
    remainder,
)
from paceline.codecs.kernel.payload import PayloadHeader


def encode_onebit(
    x: torch.Tensor, residual: torch.Tensor | None, body: torch.Tensor, arguments: dict[str, Any]
) -> tuple[PayloadHeader, int, int]:
    """Write the body; see `device.encode`."""
    block = arguments["parameter"]
    blocks = payload.num_blocks(x.numel(), block)
    num_warps = 2 if residual is None else 4  # measured
    has_residual = residual is not None
    launch_by_blocks(
        _encode, x.numel(), block, x, residual, body, x.numel(), blocks, has_residual, num_warps=num_warps
    )
    return PayloadHeader("onebit", x.numel(), parameter=block), 2 * blocks + (x.numel() + 7) // 8, 0


def decode_onebit(header: PayloadHeader, body: torch.Tensor, out: torch.Tensor, accumulate: bool) -> None:
    """Store or add what the body holds; see `device.decode`."""
    block = payload.check_block(header)
    blocks = payload.num_blocks(header.numel, block)
    payload.check_body_bytes(header, body.numel(), 2 * blocks + (header.numel + 7) // 8)
    launch_by_blocks(_decode, header.numel, block, body, out, header.numel, blocks, accumulate)


@triton.jit
def _value(x, residual, index, inside, HAS_RESIDUAL: tl.constexpr):
    value = tl.load(x + index, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        value = added(value, tl.load(residual + index, mask=inside, other=0.0))
    return value


@triton.jit
def _sums(
    x,
    residual,
    left,
    FACTOR: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """FACTOR · Σ |value| of each row. The order is part of the format: 16 lanes, then their halves."""
    row = tl.arange(0, ROWS)
    start = row[:, None] * BLOCK + tl.arange(0, 16)[None, :]
    lanes = tl.zeros([ROWS, 16], tl.float32)
    for group in tl.range(0, BLOCK // 16, loop_unroll_factor=8):
        index = start + group * 16
        value = _value(x, residual, index, index < left, HAS_RESIDUAL)
        lanes += magnitude_of(value).to(tl.float32, bitcast=True) * FACTOR
    lanes = tl.sum(tl.reshape(lanes, [ROWS, 2, 8]), axis=1)
    lanes = tl.sum(tl.reshape(lanes, [ROWS, 2, 4]), axis=1)
    lanes = tl.sum(tl.reshape(lanes, [ROWS, 2, 2]), axis=1)
    return tl.sum(lanes, axis=1)


@triton.jit
def _mean(x, residual, left, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Mean |value| of each row; where the sum overflows, of values divided by the longest block."""
    row = tl.arange(0, ROWS)
    total = _sums(x, residual, left, 1.0, HAS_RESIDUAL, BLOCK, ROWS)
    length = tl.minimum(tl.maximum(left - row * BLOCK, 1), BLOCK)
    mean = tl.div_rn(total, length.to(tl.float32))
    is_too_large = total == float("inf")
    if tl.max(is_too_large.to(tl.int32), axis=0) > 0:
        smaller = _sums(x, residual, left, 1.0 / 4096, HAS_RESIDUAL, BLOCK, ROWS)
        mean = tl.where(is_too_large, tl.div_rn(smaller, length.to(tl.float32)) * 4096.0, mean)
    return mean


@triton.jit
def _encode(
    x, residual, body, numel, blocks, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    base = tl.program_id(0).to(tl.int64) * (ROWS * BLOCK)
    left = numel - base
    x += base
    if HAS_RESIDUAL:
        residual += base
    mean = _mean(x, residual, left, HAS_RESIDUAL, BLOCK, ROWS)
    scale = bfloat_of(mean)
    # A finite mean stays finite where rounding to nearest would not.
    scale = tl.where((scale == 0x7F80) & (mean < float("inf")), 0x7F7F, scale)
    row = tl.arange(0, ROWS)
    scales = body.to(tl.pointer_type(tl.int16)) + base // BLOCK
    tl.store(scales + row, scale.to(tl.int16), mask=row * BLOCK < left)
    byte = row[:, None] * (BLOCK // 8) + tl.arange(0, BLOCK // 8)[None, :]
    bit = tl.arange(0, 8)[None, None, :]
    index = byte[:, :, None] * 8 + bit
    inside = index < left
    value = tl.load(x + index, mask=inside, other=0.0)  # again, from the cache
    if HAS_RESIDUAL:
        old = tl.load(residual + index, mask=inside, other=0.0)
        value = added(value, old)
    sign = value.to(tl.int32, bitcast=True) & -0x80000000
    packed = tl.sum(tl.where(sign != 0, 1, 0) << bit, axis=2)
    tl.store(body + 2 * blocks + base // 8 + byte, packed.to(tl.uint8), mask=byte * 8 < left)
    if HAS_RESIDUAL:
        sent = ((scale << 16)[:, None, None] | sign).to(tl.float32, bitcast=True)
        tl.store(residual + index, remainder(value, sent, old), mask=inside)


@triton.jit
def _decode(body, out, numel, blocks, ACCUMULATE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    base = tl.program_id(0).to(tl.int64) * (ROWS * BLOCK)
    left = numel - base
    out += base
    row = tl.arange(0, ROWS)
    scales = body.to(tl.pointer_type(tl.int16)) + base // BLOCK
    scale = tl.load(scales + row, mask=row * BLOCK < left, other=0).to(tl.int32) << 16
    byte = row[:, None] * (BLOCK // 8) + tl.arange(0, BLOCK // 8)[None, :]
    packed = tl.load(body + 2 * blocks + base // 8 + byte, mask=byte * 8 < left, other=0).to(tl.int32)
    bit = tl.arange(0, 8)[None, None, :]
    index = byte[:, :, None] * 8 + bit
    sign = ((packed[:, :, None] >> bit) & 1) << 31
    value = (scale[:, None, None] ^ sign).to(tl.float32, bitcast=True)
    if ACCUMULATE:
        value = tl.load(out + index, mask=index < left, other=0.0) + value
    tl.store(out + index, value, mask=index < left)
