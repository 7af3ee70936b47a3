"""Inputs of every dtype as NumPy arrays, and what a reduction of them must give, bit for bit.

bfloat16, which NumPy lacks, is an array of float32 whose results are rounded after every step, as an executor
does that keeps values in the dtype between two steps.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from paceline.schedule.interpret import COMBINE, divide
from paceline.types import ReduceOp

DTYPES = (
    "float32", "float64", "float16", "bfloat16", "int8", "uint8", "int16", "uint16", "int32", "uint32",
    "int64", "uint64", "bool", "complex64", "complex128",
)  # fmt: skip
HALVES = ("float16", "bfloat16")
Array = np.ndarray[Any, Any]


class BFloat16(np.ndarray):
    """float32 numbers that a bfloat16 can hold."""

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        plain = [np.asarray(x) if isinstance(x, BFloat16) else x for x in inputs]
        return rounded(getattr(ufunc, method)(*plain, **options))


def rounded(values: Array) -> BFloat16:
    """To the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    up = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    kept = np.where(np.isnan(values), np.uint32(0x7FC00000), up)
    return kept.view(np.float32).view(BFloat16)


def inputs(dtype: str, op: ReduceOp, num_ranks: int, sizes: Sequence[int]) -> list[Array]:
    """One array for each rank, of `sizes[r]` elements."""
    found = [np.resize(_pool(dtype, op is ReduceOp.PRODUCT, r), n) for r, n in enumerate(sizes[:num_ranks])]
    return [x.view(BFloat16) for x in found] if dtype == "bfloat16" else found


@functools.lru_cache(maxsize=256)
def _pool(dtype: str, is_product: bool, rank: int) -> Array:
    """A prime number of values, so that repetitions do not fall on the same place of blocks."""
    n = 9973
    rng = np.random.default_rng([DTYPES.index(dtype), rank])
    if dtype == "bool":
        return rng.integers(0, 2, n).astype(bool)
    if "int" in dtype:
        info = np.iinfo(dtype)  # the whole range: sums and products wrap
        return rng.integers(info.min, info.max, n, dtype=dtype, endpoint=True)
    if dtype.startswith("complex"):
        parts = rng.integers(-2, 3, (2, n)) if is_product else rng.standard_normal((2, n))
        # NumPy may fuse the steps of a product of complex numbers; small integers are exact either way.
        return (parts[0] + 1j * parts[1]).astype(dtype)
    values = rng.standard_normal(n)
    values[values == 0] = 1
    special = rng.integers(0, n, 40)  # infinities, not-a-number, subnormal numbers of half precision
    values[special] = np.resize([np.inf, -np.inf, np.nan, 3e-7, -3e-7], 40)
    with np.errstate(all="ignore"):
        return rounded(values) if dtype == "bfloat16" else values.astype(dtype)


def in_rank_order(arrays: Sequence[Array], dtype: str, op: ReduceOp, *, num_ranks: int = 0) -> Array:
    """Combine in the order given; half precision accumulates in float32 and is rounded once.

    `num_ranks`: what a mean is divided by; 0: it stays a sum.
    """
    wide = [np.asarray(a, dtype=np.float32) if dtype in HALVES else a for a in arrays]
    with np.errstate(all="ignore"):
        total = functools.reduce(COMBINE[op], wide)
        if op is ReduceOp.MEAN and num_ranks:
            total = divide(total, num_ranks)
        if dtype == "bfloat16":
            return rounded(total)
        return total.astype(arrays[0].dtype)


def tensor(values: Array, dtype: str) -> torch.Tensor:
    """A copy as a tensor."""
    plain = torch.from_numpy(np.array(values, copy=True, subok=False))
    return plain.to(torch.bfloat16) if dtype == "bfloat16" else plain


def is_same(got: torch.Tensor, want: Array) -> bool:
    """Equal bits, but for the sign and payload of NaN."""
    mine = got.float().numpy() if got.dtype == torch.bfloat16 else got.numpy()
    want = np.asarray(want)
    if mine.shape != want.shape or mine.dtype != want.dtype:
        return False
    if mine.tobytes() == want.tobytes():
        return True
    kind = f"u{mine.itemsize // 2 if mine.dtype.kind == 'c' else mine.itemsize}"
    if mine.dtype.kind == "c":
        mine, want = mine.view(mine.real.dtype), want.view(mine.real.dtype)
    equal = np.ascontiguousarray(mine).view(kind) == np.ascontiguousarray(want).view(kind)
    if mine.dtype.kind == "f":
        equal |= np.isnan(mine) & np.isnan(want)
    return bool(equal.all())
