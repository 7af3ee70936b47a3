"""Staleness as the theory has it, and what the policies promise, under several compute-time distributions."""

from __future__ import annotations

import pytest
import torch
from workbench import train

from paceline.errors import ConfigError
from paceline.strategies.base import staleness_policy
from paceline.strategies.base.strategy import make
from paceline.strategies.server.shard import Shard
from paceline.strategies.server.tally import Tally

pytestmark = pytest.mark.contract

COMPUTE = ["constant", "exponential", "pareto(shape=3)"]


def steps_for(num_workers: int) -> int:
    # Barely enough for 2,000 updates in the window, so that a bias of its ends would show.
    return {8: 300, 32: 90, 64: 60}[num_workers]


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("num_workers", [8, 32, pytest.param(64, marks=pytest.mark.slow)])
def test_closed_loop_staleness_is_n_minus_1(num_workers: int, compute: str) -> None:
    run = train(
        "parameter_server(shards=1)", num_workers=num_workers, steps=steps_for(num_workers), compute=compute
    )
    stats = run[0][1]
    assert stats["updates_counted"] >= 2000
    assert stats["staleness_mean"] == pytest.approx(num_workers - 1, rel=0.02)
    histogram = torch.tensor(stats["staleness_histogram"])
    assert int(histogram.sum()) == stats["updates_counted"]
    assert stats["staleness_max"] == len(histogram) - 1 >= num_workers - 1


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize(
    "c", [pytest.param(2, marks=pytest.mark.slow), 4, pytest.param(8, marks=pytest.mark.slow)]
)
def test_softsync_staleness_is_n_minus_1_over_c(c: int, compute: str) -> None:
    run = train(
        f"parameter_server(shards=1, staleness=softsync(c={c}))", num_workers=32, steps=90, compute=compute
    )
    assert run[0][1]["staleness_mean"] == pytest.approx(31 / c, rel=0.02)


def test_the_window_is_unbiased_however_short(compute: str = "exponential") -> None:
    """Some 750 updates of 64 workers: counting from each one's own first gives a mean 8 % too low."""
    means = []
    for seed in range(8):
        options = {"num_workers": 64, "steps": 26, "compute": compute, "seed": seed, "record": False}
        stats = train("parameter_server(shards=1)", **options)[0][1]
        assert 600 < stats["updates_counted"] < 900
        means.append(stats["staleness_mean"])
    assert sum(means) / 8 == pytest.approx(63, rel=0.02)


def test_updates_count_from_when_all_have_come_to_when_the_first_is_done() -> None:
    tally = Tally(3)
    for src, staleness in ((0, 0), (0, 5), (1, 2)):
        tally.add(src, staleness)
    assert tally.counts().sum(dim=0).tolist() == [0, 0, 0, 0, 0, 1]  # nobody knows yet whether rank 2 comes
    tally.drop(2)
    assert int(tally.counts().sum()) == 0
    for src, staleness in ((2, 4), (1, 3)):
        tally.add(src, staleness)
    tally.close()
    tally.add(0, 9)
    assert tally.counts().tolist() == [[0] * 5, [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]
    assert tally.totals() == {"applied": 6, "dropped": 1, "lost": 0}


def test_a_dead_worker_is_not_waited_for() -> None:
    tally = Tally(2)
    tally.add(0, 0)
    tally.add(0, 1)
    tally.leave(1)
    tally.add(0, 2)
    assert tally.counts().tolist() == [[0, 0, 1], [0, 0, 0]]


def test_prefetching_doubles_staleness() -> None:
    run = train("parameter_server(shards=1, prefetch=true)", num_workers=16, steps=160, compute="exponential")
    assert run[0][1]["staleness_mean"] == pytest.approx(2 * 16 - 1, rel=0.03)


@pytest.mark.parametrize("s", [0, 1, 3])
def test_bounded_clock_gap_holds_at_every_read(s: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gaps: list[int] = []
    snapshot = Shard.snapshot
    read = Shard._may_read

    def spy(self: Shard, src: int) -> bool:
        allowed = read(self, src)
        if allowed and src not in self.finished:
            live = [c for r, c in enumerate(self.clocks) if r not in self.away]
            gaps.append(self.clocks[src] - min(live, default=self.clocks[src]))
        return allowed

    monkeypatch.setattr(Shard, "_may_read", spy)
    monkeypatch.setattr(Shard, "snapshot", snapshot)
    run = train(
        f"parameter_server(shards=2, staleness=bounded(s={s}))",
        num_workers=8,
        steps=60,
        compute="pareto(shape=2)",
        faults="slow(rank=3, factor=3)",
    )
    assert len(gaps) > 900 and max(gaps) <= s
    assert max(gaps) == s
    assert run[0][1]["staleness_max"] <= (2 * s + 1) * 7


def test_reject_drops_and_counts() -> None:
    run = train(
        "parameter_server(shards=1, staleness=inverse+reject(max=10))",
        num_workers=8,
        steps=100,
        compute="pareto(shape=1.5)",
    )
    stats = run[0][1]
    assert stats["updates_dropped"] > 0 and stats["staleness_max"] <= 10
    assert stats["updates_applied"] + stats["updates_dropped"] == 800


def test_backup_applies_k_of_n_and_drops_the_late() -> None:
    run = train(
        "parameter_server(shards=1, staleness=backup(k=6))", num_workers=8, steps=100, compute="exponential"
    )
    stats = run[0][1]
    assert stats["staleness_max"] == 0 and stats["updates_dropped"] > 0
    assert stats["updates_applied"] + stats["updates_dropped"] == 800


@pytest.mark.parametrize(
    "spec",
    [
        "parameter_server(staleness=unheard)",
        "parameter_server(staleness=softsync(c=0))",
        "parameter_server(staleness=softsync(c=2)+backup(k=3))",
        "parameter_server(staleness=bounded)",
        "parameter_server(staleness=3)",
        "parameter_server(shards=0)",
        "parameter_server(push=0)",
        "parameter_server(sends=weights)",
        "parameter_server(rate=-1)",
        "parameter_server(stale=inverse)",
        "bmuf(period=0)",
        "bmuf(momentum=1)",
        "diloco(rate=0)",
        "streaming_diloco(fragments=200)",
        "streaming_diloco(payload=int7)",
        "gossip(mode=loud)",
    ],
)
def test_wrong_arguments_are_refused(spec: str) -> None:
    with pytest.raises(ConfigError):
        make(spec)


def test_strategy_strings_nest_and_compose() -> None:
    made = make("parameter_server(shards=4, staleness=softsync(c=4)+inverse)")
    run = train("parameter_server(shards=4, staleness=softsync(c=4)+inverse)", num_workers=6, steps=10)
    assert type(made).__name__ == "ParameterServer"
    assert all(torch.equal(r[0], run[0][0]) for r in run)


@pytest.mark.parametrize("average_inverse", ["false", "true"])
def test_fasgd_does_not_depend_on_padding(average_inverse: str) -> None:
    """Zeros between tensors, whose number depends on how the model is cut, change nothing."""
    generator = torch.Generator().manual_seed(3)
    short, padded = (staleness_policy.make(f"fasgd(average_inverse={average_inverse})") for _ in range(2))
    for _ in range(5):
        update = torch.randn(40, generator=generator)
        with_zeros = torch.cat([update, torch.zeros(24)])
        short.transform(0, update)
        padded.transform(0, with_zeros)
        assert torch.equal(with_zeros[:40], update)
        assert not with_zeros[40:].any()
    unchanged = torch.zeros(8)
    staleness_policy.make("fasgd").transform(0, unchanged)
    assert not unchanged.any()
