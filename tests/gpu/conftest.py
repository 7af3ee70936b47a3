from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from gpu_pool import GpuPool


@pytest.fixture(scope="session", params=[2, 4], ids=["2 ranks", "4 ranks"])
def pool(request: pytest.FixtureRequest) -> Iterator[GpuPool]:
    """Ranks that share one GPU."""
    yield from _opened(request.param)


@pytest.fixture(scope="session")
def pair() -> Iterator[GpuPool]:
    yield from _opened(2)


@pytest.fixture(scope="session")
def alone() -> Iterator[GpuPool]:
    """One rank, whose CUDA tensors go through NCCL."""
    yield from _opened(1)


def _opened(size: int) -> Iterator[GpuPool]:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    opened = GpuPool(size)
    yield opened
    opened.close()
