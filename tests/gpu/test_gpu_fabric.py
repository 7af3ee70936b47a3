"""Collectives on CUDA tensors: Gloo among ranks that share a GPU, NCCL for a rank that has it alone."""

from __future__ import annotations

import gpu_bodies
import pytest
from gpu_pool import GpuPool

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", gpu_bodies.OPERATIONS)
def test_ranks_that_share_a_gpu(pool: GpuPool, name: str) -> None:
    assert pool.run(gpu_bodies.operation, name, "cuda") == pool.run(gpu_bodies.operation, name, "cpu")


@pytest.mark.parametrize("name", gpu_bodies.OPERATIONS)
def test_one_rank_with_nccl(alone: GpuPool, name: str) -> None:
    assert alone.run(gpu_bodies.operation, name, "cuda") == alone.run(gpu_bodies.operation, name, "cpu")


@pytest.mark.parametrize("codec", ["", "int8", "error_feedback(codec=onebit)", "powersgd(rank=2)"])
@pytest.mark.parametrize("fixture", ["pair", "alone"])
def test_ddp_hook(request: pytest.FixtureRequest, fixture: str, codec: str) -> None:
    results = request.getfixturevalue(fixture).run(gpu_bodies.ddp, codec)
    assert len({r["digest"] for r in results}) == 1
    assert results[0]["last"] < 0.9 * results[0]["first"]
