"""Numbers of the C++ core: dtypes and reductions (`core/base/dtype.h`), operations (`engine/operation.h`)."""

from __future__ import annotations

import enum

import torch

from paceline import _core
from paceline.types import ReduceOp

DTYPE_CODES: dict[torch.dtype, int] = {
    dtype: code
    for code, dtype in enumerate(
        (
            torch.float32,
            torch.float64,
            torch.float16,
            torch.bfloat16,
            torch.int8,
            torch.uint8,
            torch.int16,
            torch.uint16,
            torch.int32,
            torch.uint32,
            torch.int64,
            torch.uint64,
            torch.bool,
            torch.complex64,
            torch.complex128,
        )
    )
}
OP_CODES: dict[ReduceOp, int] = {op: code for code, op in enumerate(ReduceOp)}
REDUCIBLE = [[_core.is_reducible(d, o) for o in range(len(OP_CODES))] for d in range(len(DTYPE_CODES))]
"""REDUCIBLE[dtype code][operator code]: whether the pair has a meaning."""
ANY_RANK = -1


class OperationKind(enum.IntEnum):
    """The operations of a group."""

    ALL_REDUCE = 0
    REDUCE = 1
    REDUCE_SCATTER = 2
    BROADCAST = 3
    ALL_GATHER = 4
    GATHER = 5
    SCATTER = 6
    ALL_TO_ALL = 7
    BARRIER = 8
