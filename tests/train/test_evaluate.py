"""Evaluation over shards equals one process, to the last sample, and leaves no trace."""

from __future__ import annotations

import data_bodies
import pytest
from rank_pool import RankPool

pytestmark = pytest.mark.xdist_group("processes")


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5])
def test_exact_for_any_number_of_ranks_and_samples(five: RankPool, ranks: int) -> None:
    for count in sorted({1, max(1, ranks - 1), ranks + 1, 1000}):
        for result in five.run(data_bodies.evaluated, count, ranks=ranks):
            assert result["ours"]["accuracy"] * count == pytest.approx(result["correct"], abs=1e-9)
            assert result["ours"]["loss"] == pytest.approx(result["loss"], rel=1e-6)
            assert result["ours"]["object"] == pytest.approx(result["object"], rel=1e-6)


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_an_empty_set_is_an_error(five: RankPool, ranks: int) -> None:
    for result in five.run(data_bodies.evaluated, 0, ranks=ranks):
        assert "ConfigError" in result["error"] and "empty" in result["error"]


@pytest.mark.parametrize("strategy", ["all_reduce", "local_sgd(period=3)"])
def test_training_is_not_disturbed(five: RankPool, strategy: str) -> None:
    with_it = five.run(data_bodies.undisturbed, strategy, True, ranks=3)
    without = five.run(data_bodies.undisturbed, strategy, False, ranks=3)
    assert with_it == without
