"""Every sample exactly once, whatever gives the samples; and positions to resume at."""

from __future__ import annotations

from collections import Counter

import data_bodies
import pytest
from rank_pool import RankPool

pytestmark = pytest.mark.xdist_group("processes")


@pytest.mark.parametrize("count", [3, 12, 13, 23, 25, 50])
@pytest.mark.parametrize("kind", ["shuffle", "distributed", "subset", "batch_sampler", "stream"])
def test_every_sample_exactly_once(three: RankPool, kind: str, count: int) -> None:
    results = three.run(data_bodies.epochs_of, kind, count)
    for epoch in range(2):
        rounds = [r["epochs"][epoch] for r in results]
        assert len({len(r) for r in rounds}) == 1  # all ranks make the same steps
        seen = Counter(int(i) for r in rounds for samples, own, *_ in r if own for i in samples)
        assert seen == Counter(range(count))
        for number, parts in enumerate(zip(*rounds, strict=True)):
            sizes = [own for _, own, _, _ in parts]
            # A rank without samples in a short round gets a batch that counts for nothing.
            assert all(own in (0, len(samples)) and len(samples) for samples, own, _, _ in parts)
            assert all(total == sum(sizes) for _, _, total, _ in parts)
            is_last = number == len(rounds[0]) - 1  # a short round may be spent on few ranks
            assert max(sizes) - min(sizes) <= 1 or is_last or kind == "batch_sampler"
        assert [last for *_, last in rounds[0]] == [False] * (len(rounds[0]) - 1) + [True]
    if kind != "stream" and count > 12:
        assert results[0]["epochs"][0] != results[0]["epochs"][1]
        assert results[0]["len"] == len(results[0]["epochs"][0])


def test_ready_batches_of_a_stream(three: RankPool) -> None:
    """Seven batches for three ranks: in the last round two ranks repeat it with weight 0."""
    results = three.run(data_bodies.epochs_of, "ready batches", 28, epochs=1)
    rounds = [r["epochs"][0] for r in results]
    assert [len(r) for r in rounds] == [3, 3, 3]
    assert Counter(i for r in rounds for s, own, *_ in r if own for i in s) == Counter(range(28))
    assert [r[-1][1:] for r in rounds] == [(4, 4, True), (0, 4, True), (0, 4, True)]


def test_drop_last_drops_the_short_round(three: RankPool) -> None:
    results = three.run(data_bodies.epochs_of, "drop_last", 30, epochs=1)
    assert [len(s) for r in results for s, *_ in r["epochs"][0]] == [4] * 6


def test_order_does_not_depend_on_the_number_of_ranks(three: RankPool) -> None:
    many = three.run(data_bodies.epochs_of, "shuffle", 24, epochs=1, batch=2)
    one = three.run(data_bodies.epochs_of, "shuffle", 24, epochs=1, batch=6, ranks=1)
    together = [[x for r in many for x in r["epochs"][0][i][0]] for i in range(4)]
    assert together == [samples for samples, *_ in one[0]["epochs"][0]]


@pytest.mark.parametrize("kind", ["shuffle", "subset", "stream"])
def test_a_resumed_epoch_continues_bit_for_bit(three: RankPool, kind: str) -> None:
    for continued, resumed in three.run(data_bodies.resumed, kind, stop=2):
        assert continued == resumed
        assert len(continued) > 4


def test_a_pass_that_is_left_is_over(three: RankPool) -> None:
    for before, batches, after in three.run(data_bodies.left_early):
        assert before == [1] and len(batches) == 4 and after == [2]


def test_ranks_with_different_amounts_of_their_own_data(three: RankPool) -> None:
    results = three.run(data_bodies.own_data, "all_reduce")
    # Rank r has samples 100r … 100r+2+2r in batches of two: four steps, the last ones on fewer ranks.
    steps = [
        [[0, 1], [100, 101], [200, 201]],
        [[2], [102, 103], [202, 203]],
        [[], [104], [204, 205]],
        [[], [], [206]],
    ]
    expected = -sum(sum(sum(p) for p in s) / sum(len(p) for p in s) for s in steps)
    assert all(abs(r["weight"] - expected) < 1e-3 for r in results), (results, expected)
    assert [r["steps"] for r in results] == [4, 4, 4]
    assert {r["samples"] for r in results} == {15}


def test_local_sgd_with_different_amounts_of_data(three: RankPool) -> None:
    results = three.run(data_bodies.own_data, "local_sgd(period=10)")
    # Weighted by minibatches done: 2, 3 and 4; what the idle ranks repeat changes nothing.
    local = [0.5 + 2, 100.5 + 102.5 + 104, 200.5 + 202.5 + 204.5 + 206]
    expected = -sum(w * x for w, x in zip((2, 3, 4), local, strict=True)) / 9
    assert all(abs(r["weight"] - expected) < 1e-3 for r in results), (results, expected)
