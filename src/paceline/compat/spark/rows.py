"""Rows of a DataFrame as tensors: which columns are meant, and Arrow's columns without a copy per row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paceline.errors import ConfigError

if TYPE_CHECKING:
    import pyarrow as pa

_HASHED_ROWS = 4096
_LABELS = ("label", "labels", "target", "targets", "y")
_FEATURES = ("features", "feature", "image", "images", "x")


@dataclass(frozen=True)
class Columns:
    """The columns to train on, and what the task's samples look like."""

    features: tuple[str, ...]
    label: str
    input_shape: tuple[int, ...]
    input_dtype: torch.dtype
    target_shape: tuple[int, ...]
    target_dtype: torch.dtype

    @property
    def names(self) -> list[str]:
        """All of them, in order."""
        return [*self.features, self.label]


def choose(
    available: Sequence[str], features: str | Sequence[str] | None, label: str | None
) -> tuple[tuple[str, ...], str]:
    """Names of the feature columns and of the label's; guessed where they were not given."""
    wanted = [features] if isinstance(features, str) else list(features or ())
    missing = [n for n in [*wanted, *([label] if label else [])] if n not in available]
    if missing:
        raise ConfigError(f"fit: the DataFrame has no column {missing[0]!r}; it has {', '.join(available)}")
    if label is None:
        found = [n for n in _LABELS if n in available and n not in wanted]
        if not found:
            raise ConfigError(
                f"fit: which column is the label? Give label=; there are {', '.join(available)}"
            )
        label = found[0]
    if not wanted:
        wanted = [n for n in _FEATURES if n in available][:1] or [n for n in available if n != label]
    if not wanted or label in wanted:
        raise ConfigError("fit: at least one column of features beside the label is needed; give features=")
    return tuple(wanted), label


def tensors(table: pa.Table, columns: Columns) -> tuple[Tensor, Tensor]:
    """An Arrow table's features [N, *input_shape] and labels [N, *target_shape].

    In an order of their content: after a shuffle, Spark gives a partition's rows in another order each time,
    and a stage that runs again must train as the first one did.
    """
    count = table.num_rows
    parts = [_array(table.column(name), name, count) for name in columns.features]
    values = parts[0] if len(parts) == 1 else np.stack([p.reshape(count) for p in parts], axis=1)
    labels = _array(table.column(columns.label), columns.label, count)
    x = _shaped(values, columns.input_shape, columns.input_dtype, ", ".join(columns.features))
    y = _shaped(labels, columns.target_shape, columns.target_dtype, columns.label)
    order = torch.argsort(_hashes(x) * 31 + _hashes(y), stable=True)
    return x[order], y[order]


def _hashes(values: Tensor) -> Tensor:
    """One number per row, from its bytes."""
    found = torch.empty(len(values), dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    factors: Tensor | None = None
    for start in range(0, len(values), _HASHED_ROWS):
        part = values[start : start + _HASHED_ROWS].contiguous().reshape(-1).view(torch.uint8)
        part = part.reshape(min(_HASHED_ROWS, len(values) - start), -1).long()
        if factors is None:
            factors = torch.randint(-(2**62), 2**62, (part.shape[1],), generator=generator)
        found[start : start + _HASHED_ROWS] = (part * factors).sum(1)  # wraps round, which is meant
    return found


def _shaped(values: NDArray[Any], shape: tuple[int, ...], dtype: torch.dtype, name: str) -> Tensor:
    try:
        return torch.from_numpy(np.array(values)).reshape(len(values), *shape).to(dtype)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"fit: column {name}: rows of {values[0].size if len(values) else 0} values ({values.dtype}) do"
            f" not fit the task's samples of shape {list(shape)}: {error}"
        ) from None


def _array(column: pa.Array, name: str, count: int) -> NDArray[Any]:
    """A column as an array [N] or [N, values per row]."""
    import pyarrow as pa

    if count == 0:
        return np.empty((0,))
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):  # combine_chunks of an empty or chunked extension
        array = pa.concat_arrays(array.chunks)
    if array.null_count:
        raise ConfigError(
            f"fit: column {name} has {array.null_count} nulls in one partition; drop or fill them"
        )
    kind = array.type
    if pa.types.is_struct(kind) and {"type", "size", "values"} <= {f.name for f in kind}:
        array = _dense_vector(array, name)
        kind = array.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        flat = array.flatten().to_numpy(zero_copy_only=False)
        return _rows(flat, count, name)
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        return _rows(np.frombuffer(b"".join(array.to_pylist()), np.uint8), count, name)
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        plain: NDArray[Any] = array.to_numpy(zero_copy_only=False)
        return plain
    raise ConfigError(
        f"fit: column {name} is of type {kind}; numbers, arrays of numbers, dense vectors or binary expected"
    )


def _dense_vector(array: pa.Array, name: str) -> pa.Array:
    """The values of Spark ML's vectors."""
    sparse = [v for v in array.field("type").to_pylist() if v != 1]
    if sparse:
        raise ConfigError(f"fit: column {name} has sparse vectors; use pyspark.ml.functions.vector_to_array")
    return array.field("values")


def _rows(flat: NDArray[Any], count: int, name: str) -> NDArray[Any]:
    if flat.size % count:
        raise ConfigError(f"fit: column {name}: rows of different lengths")
    return flat.reshape(count, -1)
