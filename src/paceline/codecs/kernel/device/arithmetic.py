"""Steps that the Triton kernels share. They round as the C++ kernels do: bit by bit, no fused multiply-add.

Kernels are launched with `enable_fp_fusion=False`, divide with `div_rn`, and compare magnitudes as integers,
for which NaN > infinity > every number.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

TILE = 2048
"""Elements that one program handles, unless a block is longer."""
EXACT: dict[str, Any] = {"enable_fp_fusion": False, "num_warps": 4}
"""Launch options of every kernel that computes with floats."""


def num_programs(numel: int, tile: int = TILE) -> tuple[int]:
    """Launch grid over `numel` elements in tiles of `tile`."""
    return (triton.cdiv(numel, tile),)


def launch_by_blocks(kernel: Any, numel: int, block: int, *arguments: object, **options: Any) -> None:
    """Launch `kernel` on whole blocks of `block` elements; it takes `arguments`, BLOCK and ROWS."""
    rows = max(1, TILE // block)
    if numel:
        kernel[num_programs(numel, rows * block)](*arguments, block, rows, **{**EXACT, **options})


@triton.jit
def added(x, residual):
    """x + residual. A NaN in x stays as it is: processors disagree about the bits of a sum with NaN."""
    return tl.where(x != x, x, x + residual)


@triton.jit
def magnitude_of(value):
    """Bits of |value| as int32."""
    return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def remainder(value, sent, old):
    """value - sent, but the old residual where that is not finite."""
    rest = value - sent
    return tl.where(magnitude_of(rest) < 0x7F800000, rest, old)


@triton.jit
def bfloat_of(value):
    """Bits of the nearest bfloat16 (ties to even; every NaN becomes the one quiet NaN), as int32."""
    bits = value.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded).to(tl.int32)


@triton.jit
def decode_scaled(
    body,
    out,
    numel,
    blocks,
    CODE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Codes of type CODE, after one float scale per block: store or add code · scale."""
    base = tl.program_id(0).to(tl.int64) * (ROWS * BLOCK)
    row = tl.arange(0, ROWS)
    index = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = index < numel - base
    scales = body.to(tl.pointer_type(tl.float32)) + base // BLOCK
    scale = tl.load(scales + row, mask=row * BLOCK < numel - base, other=0.0)
    codes = (body + 4 * blocks).to(tl.pointer_type(CODE)) + base
    value = tl.load(codes + index, mask=inside, other=0).to(tl.float32) * scale[:, None]
    if ACCUMULATE:
        value = tl.load(out + base + index, mask=inside, other=0.0) + value
    tl.store(out + base + index, value, mask=inside)


@triton.jit
def mixed(z):
    """A 32-bit integer hash of good avalanche."""
    z = (z ^ (z >> 16)) * 0x7FEB352D
    z = (z ^ (z >> 15)) * 0x846CA68B
    return z ^ (z >> 16)


@triton.jit
def popcount16(bits):
    """How many of the low 16 bits are set; the others must be 0."""
    count = bits - ((bits >> 1) & 0x5555)
    count = (count & 0x3333) + ((count >> 2) & 0x3333)
    count = (count + (count >> 4)) & 0x0F0F
    return (count + (count >> 8)) & 0x1F
