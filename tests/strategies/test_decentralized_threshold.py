"""Decentralised threshold SGD on the simulated fabric: conservation, convergence, bytes, relays, losses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from paceline.comm import current
from paceline.comm.simulated.simulate import simulate
from paceline.errors import ConfigError, PeerLost
from paceline.strategies.base import strategy as strategies
from paceline.strategies.peers.broadcast import PeerBroadcast
from paceline.train.job import Job

pytestmark = pytest.mark.distributed


def train(spec: str, steps: int, lr: float = 0.02, saves: list[Any] | None = None) -> dict[str, Any]:
    job = Job(current.provided())
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 60), nn.Tanh(), nn.Linear(60, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    model, optimizer = job.prepare(model, optimizer, strategy=spec)
    flat = job.strategy.replica.parameters[0]
    first = flat.clone()
    made = torch.zeros_like(first, dtype=torch.float64)
    if saves is not None:
        job.strategy.load_state_dict(saves[job.rank])
    losses = []
    for step in range(steps):
        x = torch.randn(16, 30, generator=torch.Generator().manual_seed(100 * step + job.rank))
        optimizer.zero_grad()
        loss = (model(x) - x[:, :5].sum(1, keepdim=True)).square().mean()
        loss.backward()
        gradient = torch.zeros_like(first)
        for parameter, view in zip(job.strategy.replica.trained, views(flat, job), strict=True):
            gradient[view] = parameter.grad.reshape(-1)
        made += (flat - lr * gradient - flat).double()
        optimizer.step()
        job.comm.charge_compute()
        losses.append(loss.item())
    saved = copy.deepcopy(job.strategy.state_dict())
    consensus = job.strategy.consensus()
    job.strategy.synchronize()
    stats = job.stats()
    result = {
        "losses": losses,
        "final": flat.clone(),
        "made": made,
        "first": first,
        "stats": stats,
        "consensus": consensus,
        "claim": job.strategy.traffic(stats["model_bytes"], job.size),
        "state": saved,
        "residuals": job.strategy.state_dict().get("codec"),
    }
    job.close()
    return result


def views(flat: torch.Tensor, job: Any) -> list[slice]:
    starts = [p.storage_offset() - flat.storage_offset() for p in job.strategy.replica.trained]
    return [slice(s, s + p.numel()) for s, p in zip(starts, job.strategy.replica.trained, strict=True)]


@pytest.mark.parametrize("size", [2, 3, 7])
@pytest.mark.parametrize("options", ["tau=0.01", "density=0.02, entropy=true", "tau=0.02, relay=true"])
def test_replicas_end_equal_and_nothing_is_lost(options: str, size: int) -> None:
    spec = f"decentralized_threshold({options})"
    results = list(simulate(train, args=(spec, 15), num_workers=size, compute="pareto(shape=3)", seed=1))
    total = sum(r["made"] for r in results) / (2 * size)  # the default rate is 1/(2N)
    for r in results:
        assert torch.equal(r["final"], results[0]["final"])
        assert not r["residuals"][0]["residual"].any()
    moved = results[0]["final"].double() - results[0]["first"]
    assert torch.allclose(moved, total, atol=2e-5)
    assert sum(r["stats"]["received"] for r in results) >= size


def test_it_learns_with_few_bytes() -> None:
    spec = "decentralized_threshold(density=0.01, entropy=true, rate=0.5)"
    results = list(simulate(train, args=(spec, 120, 0.1), num_workers=3, compute="pareto(shape=3)"))
    losses = results[0]["losses"]
    assert sum(losses[-10:]) < 0.3 * sum(losses[:10])
    stats = results[0]["stats"]
    assert 0.003 < stats["codec"]["density"] < 0.03
    assert stats["codec"]["bits_per_hit"] < 14
    assert stats["operations"]["post"]["payload_bytes"] < 0.02 * 120 * 2 * stats["model_bytes"]


@pytest.mark.parametrize("relay", ["false", "true"])
def test_bytes_are_as_claimed(relay: str) -> None:
    spec = f"decentralized_threshold(tau=0.005, relay={relay})"
    results = list(simulate(train, args=(spec, 40), num_workers=5))
    posted = sum(r["stats"]["operations"]["post"]["payload_bytes"] for r in results) / 40
    assert posted == pytest.approx(sum(r["claim"] for r in results), rel=0.02)


def test_tau_towards_zero_is_the_sum_of_all_updates() -> None:
    """With a dense start every replica holds all updates after every minibatch."""
    results = list(
        simulate(train, args=("decentralized_threshold(tau=1.0, dense_steps=12, rate=1)", 12), num_workers=3)
    )
    moved = results[0]["final"].double() - results[0]["first"]
    assert torch.allclose(moved, sum(r["made"] for r in results), atol=1e-5)
    assert results[0]["stats"]["codec"]["encodes"] == 0
    assert results[0]["stats"]["received"] == 0


def test_warm_start_with_fewer_workers() -> None:
    """Until it is over, the first two workers alone are followed, as a cluster of two would be."""
    spec = "decentralized_threshold(tau=1.0, dense_steps=9, {})"
    warm = list(simulate(train, args=(spec.format("warm_steps=9, warm_workers=2"), 9), num_workers=4))
    alone = list(simulate(train, args=(spec.format("relay=false"), 9), num_workers=2))
    all_four = list(simulate(train, args=(spec.format("warm_workers=2"), 9), num_workers=4))
    assert torch.allclose(warm[3]["final"], alone[0]["final"], atol=1e-6)
    assert not torch.allclose(all_four[3]["final"], alone[0]["final"], atol=1e-6)


def test_relay_is_the_default_beyond_16_workers() -> None:
    spec = "decentralized_threshold(tau=0.0003)"
    results = list(simulate(train, args=(spec, 8), num_workers=32, compute="pareto(shape=3)", seed=2))
    moved = results[0]["final"].double() - results[0]["first"]
    assert torch.allclose(moved, sum(r["made"] for r in results) / 64, atol=2e-5)
    for r in results:
        assert torch.equal(r["final"], results[0]["final"])
        assert r["stats"]["received"] >= 31  # the messages of all workers arrived, each once


def test_one_worker_is_plain_sgd() -> None:
    (alone,) = simulate(train, args=("decentralized_threshold(tau=0.5)", 10), num_workers=1)
    (single,) = simulate(train, args=("single", 10), num_workers=1)
    assert torch.equal(alone["final"], single["final"])
    assert alone["stats"]["payload_bytes"] == 0


def test_a_restored_run_goes_on_from_its_residuals() -> None:
    spec = "decentralized_threshold(tau=0.01)"
    before = list(simulate(train, args=(spec, 10), num_workers=2))
    assert before[0]["state"]["codec"][0]["residual"].any()
    after = list(simulate(train, args=(spec, 0, 0.02, [r["state"] for r in before]), num_workers=2))
    assert torch.allclose(after[0]["final"], before[0]["final"], atol=1e-5)


def test_consensus_is_the_model_if_training_stopped_now() -> None:
    results = list(simulate(train, args=("decentralized_threshold(tau=0.01)", 8), num_workers=3))
    for r in results:
        assert torch.allclose(r["consensus"][0], r["final"], atol=0.02)
        assert torch.equal(r["consensus"][0], results[0]["consensus"][0])


def test_a_lost_worker_does_not_stop_the_others() -> None:
    run = simulate(
        train,
        args=("decentralized_threshold(tau=0.01)", 30),
        num_workers=4,
        compute="constant(mean_s=0.1)",
        faults="kill(rank=2, at_s=1.0)",
    )
    assert run.killed == [2]
    alive = [r for r in run if r is not None]
    assert len(alive) == 3
    for r in alive:
        assert torch.equal(r["final"], alive[0]["final"])
        assert sum(r["losses"][-5:]) < sum(r["losses"][:5])


@pytest.mark.parametrize(
    "options",
    ["tau=0", "density=2", "rate=0", "dense_steps=-1", "warm_workers=0", "warm_steps=-2", "tau=0.1, foo=3"],
)
def test_bad_options(options: str) -> None:
    with pytest.raises(ConfigError):
        strategies.make(f"decentralized_threshold({options})")


class DyingPeer:
    """The communicator of rank 0 of three, whose rank 1 dies while an update is sent to it."""

    rank, size = 0, 3

    def __init__(self) -> None:
        self.sent: list[int] = []

    def serve(self, channel: str, handler: Any) -> None:
        pass

    def on_lost(self, callback: Any) -> None:
        pass  # it runs on another thread, later

    def post(self, peer: int, channel: str, message: Any) -> None:
        if peer == 1:
            raise PeerLost("rank 0: rank 1 is lost: the connection was closed")
        self.sent.append(peer)


@pytest.mark.parametrize("is_relayed", [False, True])
def test_a_peer_that_dies_while_an_update_is_sent_to_it(is_relayed: bool) -> None:
    comm: Any = DyingPeer()
    broadcast = PeerBroadcast(comm, "updates", is_relayed=is_relayed)
    for _ in range(2):
        broadcast.send([torch.ones(1)])
    assert comm.sent == [2, 2] and broadcast.lost == {1}
