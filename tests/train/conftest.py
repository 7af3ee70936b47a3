from __future__ import annotations

from collections.abc import Iterator

import pytest
from rank_pool import RankPool


@pytest.fixture(scope="session")
def three(fabric: str) -> Iterator[RankPool]:
    pool = RankPool(3, fabric)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def five(fabric: str) -> Iterator[RankPool]:
    pool = RankPool(5, fabric)
    yield pool
    pool.close()
