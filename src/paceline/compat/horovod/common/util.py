"""Small functions that scripts import from `horovod.common.util`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, TypeVar

import torch

__all__ = ["env", "extension_available", "gpu_available", "is_iterable", "num_rank_is_power_2", "split_list"]
T = TypeVar("T")


def extension_available(ext_base_name: str, verbose: bool = False) -> bool:
    """Whether the interface for a framework exists; here that of torch alone."""
    return ext_base_name == "torch"


def gpu_available(ext_base_name: str, verbose: bool = False) -> bool:
    """Whether this process sees a GPU."""
    return extension_available(ext_base_name) and torch.cuda.is_available()


@contextmanager
def env(**variables: str | None) -> Iterator[None]:
    """Set environment variables inside; None removes one."""
    before = {name: os.environ.get(name) for name in variables}
    _set(variables)
    try:
        yield
    finally:
        _set(before)


def _set(variables: dict[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def num_rank_is_power_2(num_rank: int) -> bool:
    """Whether a number of ranks is a power of two, as Adasum needs."""
    return num_rank > 0 and num_rank & (num_rank - 1) == 0


def split_list(items: Sequence[T], n: int) -> list[Sequence[T]]:
    """Cut a sequence into `n` parts of nearly equal length; the first ones are longer."""
    size, longer = divmod(len(items), n)
    bounds = [i * size + min(i, longer) for i in range(n + 1)]
    return [items[start:end] for start, end in pairwise(bounds)]


def is_iterable(x: Any) -> bool:
    """Whether one can go over `x`."""
    try:
        iter(x)
    except TypeError:
        return False
    return True
