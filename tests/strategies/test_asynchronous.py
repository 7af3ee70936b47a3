"""What every asynchronous (and periodic) strategy promises in simulation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from workbench import continued_and_resumed, train

from paceline.errors import ConfigError, PeerLost
from paceline.strategies.base.strategy import make
from paceline.strategies.server.protocol import Presence, ShardExchange
from paceline.strategies.server.recording import HeldExchange, Recording

pytestmark = pytest.mark.contract

ASYNCHRONOUS = [
    "parameter_server",
    "parameter_server(shards=2, staleness=softsync(c=3)+inverse)",
    "parameter_server(staleness=bounded(s=1))",
    "parameter_server(staleness=backup(k=4), shards=3)",
    "parameter_server(staleness=polynomial(a=0.5)+reject(max=20), push=2, pull=3)",
    "parameter_server(staleness=fasgd, prefetch=true)",
    "gossip",
    "gossip(mode=synchronous, period=2)",
]
PERIODIC = [
    "local_sgd(period=4)",
    "bmuf(period=4)",
    "diloco(period=4)",
    "slowmo(period=4)",
    "streaming_diloco(period=4, fragments=2)",
    "streaming_diloco(period=4, delay=2, payload=bfloat16)",
]
THRESHOLD = ["decentralized_threshold(tau=0.02)", "decentralized_threshold(relay=true)"]
NOISY = {"compute": "pareto(shape=2)"}


@pytest.mark.parametrize("strategy", ASYNCHRONOUS + PERIODIC + THRESHOLD)
def test_same_seed_same_bits_same_log(strategy: str) -> None:
    first, second = (train(strategy, num_workers=6, steps=15, seed=3, **NOISY) for _ in range(2))
    assert first.log.digest() == second.log.digest() and first.seconds == second.seconds
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a[0], b[0])
    assert train(strategy, num_workers=6, steps=15, seed=4, **NOISY).log.digest() != first.log.digest()


@pytest.mark.parametrize("num_workers", [1, 2, 5])
@pytest.mark.parametrize("strategy", ASYNCHRONOUS + PERIODIC + THRESHOLD)
def test_replicas_are_equal_after_synchronize(strategy: str, num_workers: int) -> None:
    run = train(strategy, num_workers=num_workers, steps=11, **NOISY)
    assert all(torch.equal(result[0], run[0][0]) for result in run)
    assert not torch.equal(run[0][0], torch.linspace(-1, 1, 10, dtype=torch.float64))


@pytest.mark.parametrize("strategy", ASYNCHRONOUS + THRESHOLD)
def test_consensus_is_the_same_everywhere_and_changes_nothing(strategy: str) -> None:
    seen: dict[int, list[torch.Tensor]] = {}

    def look(rank: int, step: int, method: Any) -> None:
        if step == 7:
            before = method.replica.parameters[0].clone()
            seen[rank] = method.consensus()
            assert torch.equal(before, method.replica.parameters[0])

    train(strategy, num_workers=5, steps=12, each_step=look, **NOISY)
    assert all(torch.equal(seen[r][0], seen[0][0]) for r in range(5))


@pytest.mark.parametrize("strategy", ASYNCHRONOUS + PERIODIC)
def test_traffic_claim_equals_the_ledger(strategy: str) -> None:
    steps, workers, numel = 120, 6, 4000
    run = train(strategy, num_workers=workers, steps=steps, numel=numel, dtype=torch.float32, **NOISY)
    sent = sum(result[1]["payload_bytes"] for result in run) / workers / steps
    assert make(strategy).traffic(numel * 4, workers) == pytest.approx(sent, rel=0.06)


@pytest.mark.parametrize("strategy", ASYNCHRONOUS + PERIODIC + THRESHOLD)
def test_save_and_continue_equals_save_exit_resume(strategy: str) -> None:
    """In simulation with constant compute times, so that both halves meet the same order."""
    through, resumed = continued_and_resumed(strategy, torch.linspace(-1, 1, 10, dtype=torch.float64))
    assert torch.equal(through[0], resumed[0])


KILLED = [*ASYNCHRONOUS[:7], *THRESHOLD]


def survive(strategy: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rank = int(torch.randint(0, 6, (1,), generator=generator))
    at_s = float(torch.rand(1, generator=generator)) * 0.3
    run = train(
        strategy, num_workers=6, steps=12, seed=seed, faults=f"kill(rank={rank}, at_s={at_s})", **NOISY
    )
    living = [r for i, r in enumerate(run.results) if i not in run.killed]
    assert len(living) >= 5 and all(r is not None for r in living)
    assert all(torch.equal(r[0], living[0][0]) and r[0].isfinite().all() for r in living)


@pytest.mark.parametrize("strategy", KILLED)
@pytest.mark.parametrize("seed", range(6))
def test_others_go_on_when_a_worker_is_killed(strategy: str, seed: int) -> None:
    survive(strategy, seed)


@pytest.mark.exhaustive
@pytest.mark.parametrize("strategy", KILLED)
@pytest.mark.parametrize("first", range(0, 200, 25))
def test_others_go_on_at_200_moments(strategy: str, first: int) -> None:
    for seed in range(first, first + 25):
        survive(strategy, seed)


def test_several_deaths_pauses_and_a_partition() -> None:
    run = train(
        "parameter_server(shards=4, staleness=inverse)",
        num_workers=8,
        steps=30,
        faults="random(kills=3, pauses=4, until_s=0.3)+partition(ranks='0 1', at_s=0.1, for_s=0.05)",
        **NOISY,
    )
    living = [r for i, r in enumerate(run.results) if i not in run.killed]
    assert len(living) == 5 and all(torch.equal(r[0], living[0][0]) for r in living)


def test_dead_owner_loses_no_slice_and_lost_updates_are_counted() -> None:
    run = train(
        "parameter_server(shards=1, backup=50)",
        num_workers=4,
        steps=40,
        faults="kill(rank=0, at_s=0.2)",
        compute="exponential",
    )
    stats = run[1][1]
    assert run.killed == [0]
    assert stats["updates_lost"] >= 0 and stats["updates_applied"] > 0
    assert torch.equal(run[1][0], run[3][0])


def test_synchronous_strategies_name_the_dead() -> None:
    with pytest.raises(PeerLost, match="rank 2 is lost"):
        train("local_sgd(period=2)", num_workers=4, steps=20, faults="kill(rank=2, at_s=0.05)")


@pytest.mark.parametrize(
    "options",
    [
        "shards=3, staleness=softsync(c=2)+inverse",
        "staleness=bounded(s=1)",
        "shards=3, staleness=backup(k=3)",
        "shards=2, staleness=fasgd, prefetch=true",
        "push=2, pull=3",
    ],
)
def test_replay_repeats_a_recorded_order_under_other_compute_times(tmp_path: Path, options: str) -> None:
    file = tmp_path / "order"
    base: dict[str, Any] = {"num_workers": 4, "steps": 40}
    text = f"parameter_server({options}, {{}}='{file}')"
    recorded = train(text.format("record"), seed=1, compute="exponential", **base)
    others = [("constant", 2), ("exponential", 3), ("pareto(shape=2)", 4)]
    for compute, seed in others:
        repeated = train(text.format("replay"), seed=seed, compute=compute, **base)
        assert torch.equal(recorded[0][0], repeated[0][0]), compute
    other = train(f"parameter_server({options})", seed=4, compute="pareto(shape=2)", **base)
    assert not torch.equal(recorded[0][0], other[0][0])


def test_a_recording_of_other_workers_or_shards_is_refused(tmp_path: Path) -> None:
    text = f"parameter_server(shards={{}}, {{}}='{tmp_path / 'order'}')"
    train(text.format(2, "record"), num_workers=3, steps=2)
    for shards, workers in ((1, 3), (2, 4), (2, 2)):
        with pytest.raises(ConfigError, match="recorded 3 workers and 2 shards"):
            train(text.format(shards, "replay"), num_workers=workers, steps=2)


def test_after_the_end_of_a_recording_exchanges_pass_as_they_come(tmp_path: Path) -> None:
    """A rank writes its file when it sees the end; a faster rank's next exchange may be in it already."""
    file = tmp_path / "order"
    file.write_text(json.dumps({"threads": 1, "shards": {"0": [[0, 1], [1, 1], [1, 2]]}}))
    recording = Recording(replay=str(file))
    reply: Any = object()
    early = ShardExchange(0, 2, 0, is_push=True, is_pull=True, presence=Presence.TRAINING)
    assert recording.may_go(0, 0, 1) and recording.released(0) == []
    assert not recording.may_go(0, 0, 2)
    recording.hold(0, early, reply)
    assert recording.may_go(0, 1, 1) and recording.released(0) == []
    assert recording.may_go(0, 1, 2)
    assert recording.released(0) == [HeldExchange(0, early, reply)]
    assert recording.may_go(0, 0, 3)
