"""Whether all ranks have the same data: numbers that are equal for equal samples, compared over the ranks."""

from __future__ import annotations

import contextlib
import hashlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Subset

from paceline.comm.spread import of_all_ranks
from paceline.errors import Mismatch
from paceline.train import random_state
from paceline.types import Communicator, named

UNKNOWN = 0
"""What cannot be compared; no digest has this value."""
_SAMPLED = 1 << 14  # elements of a large tensor, and items of a long list, that are looked at


def digest(value: Any, *, whole: bool = False) -> int:
    """A number for tensors, arrays, numbers, strings and containers of them; of others, the type counts.

    Of large tensors and long lists, evenly spread parts count, unless `whole`. At least 1.
    """
    return zlib.crc32(repr(_facts(value, 1 << 62 if whole else _SAMPLED)).encode()) + 1


def exact(content: bytes) -> int:
    """A number for these bytes, for what must not differ unnoticed. At least 1."""
    return int.from_bytes(hashlib.sha256(content).digest()[:7], "big") + 1


def dataset_digest(dataset: Any, *, may_fetch: bool, columns: bool = False) -> int:
    """A number for a dataset with indices, or UNKNOWN.

    Args:
        dataset: With `__len__` and `__getitem__`.
        may_fetch: Whether samples may be fetched in this process. Each is fetched twice from equal random
            states: what differs even then is random by itself, and is not compared.
        columns: Whether what it holds for each of its samples is compared, such as lists of files.
    """
    if isinstance(dataset, ConcatDataset):
        parts = [dataset_digest(one, may_fetch=may_fetch, columns=columns) for one in dataset.datasets]
        return UNKNOWN if UNKNOWN in parts else digest(parts)
    if isinstance(dataset, Subset):
        inner = dataset_digest(dataset.dataset, may_fetch=may_fetch, columns=columns)
        return UNKNOWN if inner == UNKNOWN else digest([len(dataset), list(dataset.indices), inner])
    count = len(dataset)
    held = [_names(one) for one in _columns(dataset, count)] if columns else []
    own = [_sample(dataset, index) for index in sorted({0, count // 2, count - 1}) if count and may_fetch]
    return UNKNOWN if UNKNOWN in own else digest([count, held, own])


def different(own: int, comm: Communicator) -> list[int]:
    """The ranks whose number differs from rank 0's; none if one of the numbers is UNKNOWN. Collective."""
    if comm.size == 1:
        return []
    numbers = of_all_ranks(torch.tensor([own]), comm).flatten().tolist()
    return [] if UNKNOWN in numbers else [r for r, one in enumerate(numbers) if one != numbers[0]]


def check_same(what: str, own: int, comm: Communicator, advice: str) -> None:
    """Mismatch that names the ranks with another number than rank 0. Collective.

    Args:
        what: The thing that must be the same everywhere.
        own: This rank's number, or UNKNOWN.
        comm: The ranks.
        advice: What to do instead.
    """
    if others := different(own, comm):
        raise Mismatch(f"rank {comm.rank}: {what} of {named(others)} differs from rank 0's. {advice}")


def _sample(dataset: Any, index: int) -> int:
    with contextlib.suppress(Exception):  # the loop will meet it, where the user expects it
        with random_state.fixed(0):
            first = digest(dataset[index])
        with random_state.fixed(0):
            again = digest(dataset[index])
        return first if first == again else UNKNOWN
    return UNKNOWN


def _columns(dataset: Any, count: int) -> list[Any]:
    """What a dataset holds for each of its samples: lists, tensors and arrays of its length."""
    columns = []
    for name, held in sorted(vars(dataset).items() if hasattr(dataset, "__dict__") else ()):
        for one in held if name == "tensors" and isinstance(held, tuple) else [held]:
            is_column = isinstance(one, list) or (
                isinstance(one, (torch.Tensor, np.ndarray)) and one.ndim > 0
            )
            if is_column and len(one) == count and not _is_cache(one):
                columns.append(one)
    return columns


def _is_cache(column: Any) -> bool:
    """What is filled in one after the other differs over the ranks."""
    return isinstance(column, list) and any(one is None for one in column)


def _names(column: Any) -> Any:
    """Paths by their last part: the same files may lie elsewhere on another host."""
    if isinstance(column, list):
        return [_names(one) for one in _spread(column, _SAMPLED)]
    if isinstance(column, tuple):
        return tuple(_names(one) for one in column)
    return column.rsplit("/", 1)[-1] if isinstance(column, str) else column


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    return list(items[:: -(-len(items) // most) or 1])


def _facts(value: Any, most: int) -> Any:
    """What `digest` looks at: at most `most` elements of a tensor or list."""
    if isinstance(value, np.ndarray) and value.dtype != object:
        flat = value.reshape(-1)
        content = np.ascontiguousarray(flat[:: -(-flat.size // most) or 1])
        return ("array", value.shape, str(value.dtype), zlib.crc32(content.tobytes()))
    if isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_quantized:
        elements = value.detach().reshape(-1)
        part = elements[:: -(-elements.numel() // most) or 1].cpu().resolve_conj().contiguous()
        return (
            "tensor",
            tuple(value.shape),
            str(value.dtype),
            zlib.crc32(part.view(torch.uint8).numpy().tobytes()),
        )
    if isinstance(value, Mapping):
        return {repr(key): _facts(one, most) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [len(value), *(_facts(one, most) for one in _spread(value, most))]
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, np.generic)):
        return value
    return type(value).__qualname__
