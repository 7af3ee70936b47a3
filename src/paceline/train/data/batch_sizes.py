"""How many samples a ready-made batch has: what the user says, or what cannot be meant otherwise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from paceline.errors import ConfigError

BatchSizeOf = Callable[[Any], int]


class Measured:
    """The user's `batch_size_of`, or `count_samples`.

    Args:
        given: The user's function; None: none.
        must_be_sure: False where the number decides nothing: with one rank an unclear batch counts as one.
    """

    def __init__(self, given: BatchSizeOf | None, *, must_be_sure: bool) -> None:
        self._given, self._must_be_sure = given, must_be_sure

    def __call__(self, batch: Any) -> int:
        if self._given is not None:
            count = int(self._given(batch))
            if count < 1:
                raise ConfigError(f"batch_size_of returned {count}; a batch has at least one sample")
            return count
        try:
            return count_samples(batch)
        except ConfigError:
            if self._must_be_sure:
                raise
            return 1

    def other_than(self, expected: int, batch: Any) -> int | None:
        """How many samples a batch has if that is clear and another number than expected; else None."""
        if self._given is None:
            return other_count(expected, batch)
        count = int(self._given(batch))
        return None if count == expected else count


def other_count(expected: int, batch: Any) -> int | None:
    """The number of samples of a batch of which each tensor says another number than expected; else None.

    Not clear are fields that are no tensors, more samples in the same proportion (views of each sample),
    tensors with the expected number in another dimension (time first), and lists of that many tensors alike.
    Quick, as it looks at each batch: of most, at the first tensor.
    """
    if batch is None:
        return 0
    if isinstance(batch, torch.Tensor):
        parts: list[Any] = [batch]
    elif isinstance(batch, (Mapping, list, tuple)):
        parts = list(batch.values()) if isinstance(batch, Mapping) else list(batch)
    else:
        return None
    shapes: list[torch.Size] = []
    for part in parts:
        if isinstance(part, torch.Tensor):
            shape = part.shape
            if not shape:
                continue
            if shape[0] == expected or (shapes and shapes[0][0] != shape[0]):
                return None
            shapes.append(shape)
        elif part is not None and not isinstance(part, (str, bytes, int, float)) and not _is_column(part):
            return None
    if not shapes:
        return None if parts else 0
    count = shapes[0][0]
    may_be_samples = len(shapes) == len(parts) == expected and not isinstance(batch, Mapping)
    are_alike = may_be_samples and len({(part.dtype, part.ndim) for part in parts}) == 1
    is_elsewhere = all(expected in shape[1:] for shape in shapes)
    is_multiple = count > expected and count % expected == 0
    return None if are_alike or is_elsewhere or is_multiple else count


def count_samples(batch: Any) -> int:
    """The one length of all tensors and lists in a batch; 1 for a single number or string.

    Raises:
        ConfigError: The lengths differ, or another reading is as likely.
    """
    if isinstance(batch, torch.Tensor):
        return len(batch) if batch.ndim else 1
    if isinstance(batch, (str, bytes, int, float)):
        return 1
    is_fields = isinstance(batch, (Mapping, list, tuple))
    parts = list(batch.values()) if isinstance(batch, Mapping) else list(batch) if is_fields else []
    if parts and all(isinstance(part, (str, bytes, int, float)) for part in parts):
        return 1 if isinstance(batch, Mapping) else len(parts)
    shapes = [tuple(part.shape) for part in parts if isinstance(part, torch.Tensor) and part.ndim]
    is_list_of_images = (
        isinstance(batch, list) and len(shapes) > 1 and len({*shapes}) == 1 and len(shapes[0]) > 2
    )
    lengths = {shape[0] for shape in shapes}
    lengths |= {len(part) for part in parts if _is_column(part)}
    nested = [part for part in parts if isinstance(part, (list, tuple)) and not _is_column(part)]
    lengths |= {count_samples(part) for part in parts if isinstance(part, Mapping)}
    if len(lengths) == 1 and not nested and not is_list_of_images:
        return lengths.pop()
    raise ConfigError(
        f"how many samples a batch of this kind has is not clear: {type(batch).__name__} with lengths"
        f" {sorted(lengths)}. Say it: job.prepare(…, batch_size_of=function(batch) -> number of samples)"
    )


def _is_column(part: Any) -> bool:
    """One string or number for each sample."""
    is_list = isinstance(part, (list, tuple)) and len(part) > 0
    return is_list and all(isinstance(one, (str, bytes, int, float)) for one in part)
