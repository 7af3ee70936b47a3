"""Only what can be read back is saved: a checkpoint that cannot be loaded must not replace one that can."""

from __future__ import annotations

import io
from collections import OrderedDict
from typing import Any

import numpy as np
import torch

from paceline.errors import CheckpointError

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
_TENSORS = (torch.Tensor, torch.nn.Parameter)


def storable(value: Any, where: str) -> Any:
    """`value` as it can be saved and read without running code: NumPy's scalars become Python's.

    Args:
        value: Dictionaries, lists and tuples of tensors and plain values.
        where: What it is, for errors.

    Raises:
        CheckpointError: Something in it could not be read back; it says where.
    """
    if isinstance(value, np.generic):
        return value.item()
    kind = type(value)
    if kind in _PLAIN or kind in _TENSORS:
        return value
    if kind in (dict, OrderedDict):
        for key in value:
            if storable(key, f"a key of {where}") is not key:
                raise CheckpointError(f"{where} has a key of type {type(key).__name__}: use a plain one")
        items = {key: storable(one, f"{where}[{key!r:.40}]") for key, one in value.items()}
        return value if all(items[key] is value[key] for key in value) else kind(items)
    if kind in (list, tuple):
        parts = [storable(one, f"{where}[{i}]") for i, one in enumerate(value)]
        return value if all(a is b for a, b in zip(parts, value, strict=True)) else kind(parts)
    _try(value, where)
    return value


def _try(value: Any, where: str) -> None:
    """CheckpointError unless a value of an unusual type can be saved and read back."""
    payload = io.BytesIO()
    try:
        torch.save(value, payload)
        payload.seek(0)
        torch.load(payload, weights_only=True)
    except Exception as error:
        mend = (
            "torch.from_numpy(…) or .tolist()" if isinstance(value, np.ndarray) else "plain values or tensors"
        )
        raise CheckpointError(
            f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which cannot be read back"
            f" without running its code; save {mend}"
        ) from error
