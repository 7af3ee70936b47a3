"""Numbers, strings, lists, dicts and tensors as bytes, in torch's format; reading executes nothing."""

from __future__ import annotations

import io
from collections import OrderedDict
from typing import Any

import torch

from paceline.comm import byte_string
from paceline.types import Communicator


def pack(value: object) -> torch.Tensor:
    """Return `value` as a uint8 tensor of shape (num_bytes,)."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)


def unpack(data: torch.Tensor) -> Any:
    """Inverse of `pack`, with all tensors on the CPU.

    Raises pickle.UnpicklingError for anything that is not plain (`weights_only`).
    """
    return torch.load(io.BytesIO(data.numpy().tobytes()), map_location="cpu", weights_only=True)


def broadcast(value: object, comm: Communicator) -> Any:
    """Rank 0's `value` on every rank; what the others pass is not looked at."""
    data = byte_string.broadcast(pack(value if comm.rank == 0 else None), comm)
    return value if comm.rank == 0 else unpack(data)


def simple(value: Any, *, functions: bool = False) -> Any:
    """`value` with NumPy's numbers as Python's, so that reading it back needs nothing but `weights_only`.

    Functions, as some optimizers keep in their groups, are left out: every rank has its own.

    Args:
        value: Nested dicts, lists and tuples; others are not looked into.
        functions: Whether functions stay.
    """
    if isinstance(value, dict):
        kept = {key: one for key, one in value.items() if functions or not callable(one)}
        items = {key: simple(one, functions=functions) for key, one in kept.items()}
        return OrderedDict(items) if isinstance(value, OrderedDict) else items
    if type(value) in (list, tuple):
        return type(value)(simple(one, functions=functions) for one in value)
    if hasattr(value, "item") and not isinstance(value, torch.Tensor) and getattr(value, "shape", None) == ():
        return value.item()
    return value
