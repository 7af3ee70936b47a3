"""fp16 with a power-of-two scale per block, and bf16: kernels for the formats in codecs/fp16.py, bf16.py."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from paceline.codecs.kernel import payload
from paceline.codecs.kernel.device.arithmetic import (
    EXACT,
    TILE,
    added,
    bfloat_of,
    decode_scaled,
    launch_by_blocks,
    magnitude_of,
    num_programs,
    remainder,
)
from paceline.codecs.kernel.payload import PayloadHeader
from paceline.errors import ProtocolError


def encode_fp16(
    x: torch.Tensor, residual: torch.Tensor | None, body: torch.Tensor, arguments: dict[str, Any]
) -> tuple[PayloadHeader, int, int]:
    """Write the body; see `device.encode` for the arguments and what is returned."""
    block = arguments["parameter"]
    blocks = payload.num_blocks(x.numel(), block)
    launch_by_blocks(
        _encode_fp16, x.numel(), block, x, residual, body, x.numel(), blocks, residual is not None
    )
    return PayloadHeader("fp16", x.numel(), parameter=block), 4 * blocks + 2 * x.numel(), 0


def decode_fp16(header: PayloadHeader, body: torch.Tensor, out: torch.Tensor, accumulate: bool) -> None:
    """Store or add what the body holds; see `device.decode`."""
    block = payload.check_block(header)
    blocks = payload.num_blocks(header.numel, block)
    payload.check_body_bytes(header, body.numel(), 4 * blocks + 2 * header.numel)
    launch_by_blocks(
        decode_scaled, header.numel, block, body, out, header.numel, blocks, tl.float16, accumulate
    )


def encode_bf16(
    x: torch.Tensor, residual: torch.Tensor | None, body: torch.Tensor, arguments: dict[str, Any]
) -> tuple[PayloadHeader, int, int]:
    """Write the body; see `device.encode`."""
    if x.numel():
        _encode_bf16[num_programs(x.numel())](
            x, residual, body, x.numel(), residual is not None, TILE, **EXACT
        )
    return PayloadHeader("bf16", x.numel()), 2 * x.numel(), 0


def decode_bf16(header: PayloadHeader, body: torch.Tensor, out: torch.Tensor, accumulate: bool) -> None:
    """Store or add what the body holds; see `device.decode`."""
    if header.parameter != 0:
        raise ProtocolError("bf16 payload: it has no parameter")
    payload.check_body_bytes(header, body.numel(), 2 * header.numel)
    if header.numel:
        _decode_bf16[num_programs(header.numel)](body, out, header.numel, accumulate, TILE, **EXACT)


@triton.jit
def _encode_fp16(
    x, residual, body, numel, blocks, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    base = tl.program_id(0).to(tl.int64) * (ROWS * BLOCK)
    row = tl.arange(0, ROWS)
    index = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = index < numel - base
    value = tl.load(x + base + index, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        old = tl.load(residual + base + index, mask=inside, other=0.0)
        value = added(value, old)
    largest = tl.max(magnitude_of(value), axis=1)
    exponent = tl.minimum(268 - (largest >> 23), 253)
    exponent = tl.where((largest == 0) | (largest >= 0x7F800000), 127, exponent)
    up = (exponent << 23).to(tl.float32, bitcast=True)
    down = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    half = (value * up[:, None]).to(tl.float16)
    code = tl.where(value != value, 0x7E00, half.to(tl.int16, bitcast=True)).to(tl.int16)
    scales = body.to(tl.pointer_type(tl.float32)) + base // BLOCK
    tl.store(scales + row, down, mask=row * BLOCK < numel - base)
    codes = (body + 4 * blocks).to(tl.pointer_type(tl.int16)) + base
    tl.store(codes + index, code, mask=inside)
    if HAS_RESIDUAL:
        sent = code.to(tl.float16, bitcast=True).to(tl.float32) * down[:, None]
        tl.store(residual + base + index, remainder(value, sent, old), mask=inside)


@triton.jit
def _encode_bf16(x, residual, body, numel, HAS_RESIDUAL: tl.constexpr, SIZE: tl.constexpr):
    base = tl.program_id(0).to(tl.int64) * SIZE
    index = tl.arange(0, SIZE)
    inside = index < numel - base
    value = tl.load(x + base + index, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        old = tl.load(residual + base + index, mask=inside, other=0.0)
        value = added(value, old)
    code = bfloat_of(value)
    tl.store(body.to(tl.pointer_type(tl.int16)) + base + index, code.to(tl.int16), mask=inside)
    if HAS_RESIDUAL:
        sent = (code << 16).to(tl.float32, bitcast=True)
        tl.store(residual + base + index, remainder(value, sent, old), mask=inside)


@triton.jit
def _decode_bf16(body, out, numel, ACCUMULATE: tl.constexpr, SIZE: tl.constexpr):
    base = tl.program_id(0).to(tl.int64) * SIZE
    index = tl.arange(0, SIZE)
    inside = index < numel - base
    code = tl.load(body.to(tl.pointer_type(tl.int16)) + base + index, mask=inside, other=0)
    value = (code.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    if ACCUMULATE:
        value = tl.load(out + base + index, mask=inside, other=0.0) + value
    tl.store(out + base + index, value, mask=inside)
