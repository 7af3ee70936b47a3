"""Numbers of the C++ core for dtypes, reductions and operations, all taken from the core itself."""

from __future__ import annotations

import torch

from paceline import _core
from paceline.types import ReduceOp

DTYPE_CODES: dict[torch.dtype, int] = {getattr(torch, name): code for code, name in enumerate(_core.DTYPES)}
OP_CODES: dict[ReduceOp, int] = {ReduceOp(name): code for code, name in enumerate(_core.REDUCE_OPS)}
REDUCIBLE = [[_core.is_reducible(d, o) for o in range(len(OP_CODES))] for d in range(len(DTYPE_CODES))]
"""REDUCIBLE[dtype code][operator code]: whether the pair has a meaning."""
ANY_RANK = _core.ANY_RANK
OperationKind = _core.OperationKind
