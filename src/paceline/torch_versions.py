"""What differs between the versions of torch that Paceline runs on; nothing else asks for the version."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
import torch.distributed as dist

OLDEST, NEWEST_TRIED = (2, 10), (2, 14)
"""Releases (major, minor): the oldest that is supported, and the newest that was tried."""
TORCH = tuple(int(part) for part in torch.__version__.partition("+")[0].split(".")[:2])

cpp: Any = torch._C._distributed_c10d  # noqa: SLF001  torch has no public name for it

HAS_PYTHON_BACKENDS = TORCH >= (2, 14)
"""Whether Python classes may subclass the C++ class `Backend`, which stands below torch's dispatcher."""

all_gather_single: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Gathers into one tensor; 2.13 gave it this name."""


@functools.cache
def warn_if_newer() -> None:
    """Say once per process that this torch is newer than those the tests were run on."""
    if TORCH > NEWEST_TRIED:
        newest = ".".join(map(str, NEWEST_TRIED))
        warnings.warn(
            f"torch {torch.__version__} is newer than {newest}, the newest that paceline was tried on. If"
            f" something fails, pip install 'torch<={newest}.99', and please report it",
            stacklevel=3,
        )
