"""Mixed precision: one decision on all ranks, counters in step; and exchange for loops of one's own."""

from __future__ import annotations

import math

import precision_bodies as bodies
import pytest
from rank_pool import RankPool

from paceline.errors import ConfigError
from paceline.train import precision

pytestmark = pytest.mark.xdist_group("processes")


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("strategy", ["all_reduce", "local_sgd(period=5)"])
def test_overflow_on_one_rank(three: RankPool, strategy: str, clip: bool) -> None:
    """All skip the step where gradients are summed; that rank alone where ranks step by themselves."""
    results = three.run(bodies.overflow, strategy, clip=clip)
    whole = {"scale": precision.INITIAL_SCALE, "good": 9, "skipped": 0}
    skipped = {"scale": precision.INITIAL_SCALE / 2, "good": 5, "skipped": 1}
    for rank, result in enumerate(results):
        skips = strategy == "all_reduce" or rank == 1
        assert result["unchanged"] == [skips and step == 3 for step in range(9)]
        assert result["minibatches"] == 9
        assert result["state"] == (skipped if skips else whole)
        # 9 sums of gradients; or two averages, each with one small message beside it at most, and the end
        assert result["all_reduces"] <= (9 if strategy == "all_reduce" else 6)
        assert result["dtypes"] == ["torch.float32"]
        assert all(math.isfinite(n) and n < 100 for n in result["norms"])  # unscaled before clipping
    assert len({r["digest"] for r in results}) == 1


@pytest.mark.parametrize(("name", "tolerance"), [("bf16", 0.05), ("fp16", 0.01)])
def test_low_precision_is_near_fp32_but_not_it(three: RankPool, name: str, tolerance: float) -> None:
    for difference in three.run(bodies.near_fp32, name):
        assert 0 < difference < tolerance


def test_unknown_precision_is_a_clear_error() -> None:
    with pytest.raises(ConfigError, match="'bf16'"):
        precision.check("float16")


def test_metrics_and_objects_for_loops_of_ones_own(three: RankPool) -> None:
    for rank, result in enumerate(three.run(bodies.own_loop)):
        assert result["metrics"] == {"loss": 2.0, "seen": 6.0}
        assert result["ranks"] == [0, 1, 2]
        assert result["sizes"] == [1, 2, 3]
        assert len(result["refused"]) == 3
        assert f"rank {rank}" in result["refused"][0]
