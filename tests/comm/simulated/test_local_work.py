"""Codecs, servers and outer steps take virtual time where a simulation is asked to charge them."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import workbench

from paceline import codecs, local_work
from paceline.codecs.kernel.charged import describe
from paceline.codecs.kernel.codec import Codec
from paceline.comm import current
from paceline.comm.simulated import work_costs
from paceline.comm.simulated.simulate import SimulatedRun, simulate
from paceline.comm.simulated.work_costs import WorkCosts
from paceline.errors import ConfigError
from paceline.local_work import WorkKind
from paceline.types import Message

NETWORK = "ethernet(gbit=10, latency_us=5)"


def fixed(**seconds: float) -> WorkCosts:
    """Costs by kind alone, whatever the size; others are free."""
    return WorkCosts(measure=lambda name, numel, rehearsal: seconds.get(name.split()[0], 0.0))


def summed(
    codec: str, costs: Any, *, steps: int = 3, numel: int = 4096, num_workers: int = 4
) -> SimulatedRun:
    """Sum a tensor over all workers with a codec, after 10 ms of computation each time."""

    def body() -> Any:
        comm = current.provided()
        reducer, state = codecs.make_reducer(codec), {}
        for _ in range(steps):
            comm.charge_compute()
            reducer.reduce(torch.randn(numel), [(0, (numel // 64, 64))], comm, state)
        return comm.now()

    return simulate(body, num_workers=num_workers, network=NETWORK, costs=costs)


@pytest.mark.parametrize(
    ("codec", "encodes", "decodes"),
    # Two stages: P chunks and a sum are encoded, P chunks and P sums decoded. Sparse: P payloads are added.
    [
        ("int8", 5, 8),
        ("error_feedback(codec=onebit)", 5, 8),
        ("topk(density=0.01)", 1, 4),
        ("powersgd", 2, 1),
    ],
)
def test_a_sum_takes_as_long_as_its_encodings_and_decodings(codec: str, encodes: int, decodes: int) -> None:
    free, charged = summed(codec, "none"), summed(codec, fixed(encode=0.01, decode=0.001))
    expected = 3 * (encodes * 0.01 + decodes * 0.001)
    assert charged.seconds - free.seconds == pytest.approx(expected, rel=1e-6)
    for own in charged.work_s:
        assert own == pytest.approx({"encode": 3 * encodes * 0.01, "decode": 3 * decodes * 0.001})
    assert not any(free.work_s)


class Slow(Codec):
    """Sends float32 as it is, after 10 ms of idleness each way."""

    def __init__(self, delay_s: float = 0.01) -> None:
        self.delay_s = delay_s

    def max_encoded_bytes(self, numel: int) -> int:
        return 4 * numel

    def encode(self, x: torch.Tensor, state: dict[str, Any], *, out: Any = None) -> torch.Tensor:
        return self.encode_with_residual(x, None, state, out=out)

    def encode_with_residual(
        self, x: torch.Tensor, residual: Any, state: dict[str, Any], *, out: Any = None
    ) -> torch.Tensor:
        time.sleep(self.delay_s)
        state["encodes"] = state.get("encodes", 0) + 1
        payload = x.detach().clone().view(torch.uint8)
        return payload if out is None else out.copy_(payload)

    def decode(self, payload: torch.Tensor, out: torch.Tensor, *, accumulate: bool = False) -> None:
        time.sleep(self.delay_s)
        out.add_(payload.clone().view(torch.float32)) if accumulate else out.copy_(
            payload.view(torch.float32)
        )

    def set_options(self, *, checksum: bool = False, use_reference: bool = False) -> None:
        pass


def test_a_slow_codec_of_a_plug_in_takes_about_as_long_as_it_really_does() -> None:
    def body() -> Any:
        comm, state = current.provided(), {}
        reducer = codecs.make_reducer(Slow())
        reducer.reduce(torch.ones(256), [], comm, state)
        return state["worker"][0]["encodes"]

    costs = WorkCosts()
    free, charged = (simulate(body, num_workers=2, network=NETWORK, costs=c) for c in ("none", costs))
    # Three encodings and four decodings, of which each sleeps for 10 ms or a little more.
    seconds = {name.split()[0]: min(sizes.values()) for name, sizes in costs.used().items()}
    assert min(seconds.values()) >= 0.01
    assert charged.seconds - free.seconds >= 0.069
    assert charged.work_s[0] == pytest.approx(
        {"encode": 3 * seconds["encode"], "decode": charged.work_s[0]["decode"]}
    )
    assert list(charged) == [1, 1], "rehearsals leave the codec's state alone"


def test_a_codec_inside_another_is_charged_once() -> None:
    heard: list[str] = []
    costs = WorkCosts(measure=lambda name, numel, rehearsal: heard.append(name) or 0.0)
    summed("error_feedback(codec=int8)", costs)
    assert all(name.split()[1].startswith("error_feedback(codec=int8(") for name in heard)
    kept = [name for name in heard if "decode" not in name]
    assert len(kept) == len(set(kept)) == 1


def test_equal_codecs_have_equal_names_and_others_do_not() -> None:
    specs = ["int8", "int8(block=32)", "topk(density=0.1)", "topk(density=0.2)", "error_feedback(codec=int8)"]
    names = [describe(codecs.make(spec)) for spec in specs]
    assert names == [describe(codecs.make(spec)) for spec in specs] and len(set(names)) == len(specs)


def served(costs: Any, num_workers: int = 8) -> SimulatedRun:
    return workbench.train(
        "parameter_server(shards=1, backup=0)",
        num_workers=num_workers,
        steps=40,
        costs=costs,
        network=NETWORK,
    )


def test_a_server_with_slow_updates_is_the_bottleneck() -> None:
    """Eight workers of 10 ms would make 800 minibatches/s; a server that needs 5 ms for each handles 200."""
    quick, slow = served("none"), served(fixed(server=0.0025))  # an update, and the copy that is the answer
    assert quick.seconds == pytest.approx(0.4, rel=0.05)
    assert slow.seconds == pytest.approx(40 * 8 * 0.005, rel=0.05)
    # Each request waits for the seven before it: a round is eight services long, 10 ms of it computation.
    waited = [stats["wait_s"] / 40 for _, stats, _ in slow]
    assert min(waited) == pytest.approx(8 * 0.005 - 0.01, rel=0.1)
    assert slow.work_s[0]["server"] == pytest.approx(40 * 8 * 0.005, rel=0.02)
    assert not any(own.get("server") for own in slow.work_s[1:])


def test_two_shards_halve_the_queue() -> None:
    costs = WorkCosts(measure=lambda name, numel, rehearsal: 0.0005 * numel * name.startswith("server"))
    one, two = (
        workbench.train(f"parameter_server(shards={k}, backup=0)", num_workers=8, steps=40, costs=costs)
        for k in (1, 2)
    )
    assert two.seconds == pytest.approx(one.seconds / 2, rel=0.1)


def test_requests_wait_in_their_order_while_a_handler_works() -> None:
    def body() -> Any:
        comm, order = current.provided(), []

        def handle(src: int, message: Message) -> Message:
            order.append((src, round(comm_now(), 3)))
            local_work.charge(WorkKind.SERVER, "test", 1, lambda: lambda: None)
            return Message()

        def comm_now() -> float:
            return float(comm._cluster.clock.now)

        comm.serve("a", handle)
        comm.barrier().wait()
        if comm.rank:
            comm.charge_compute(0.1 * comm.rank)
            comm.call(0, "a", Message()).wait()
            return round(comm.now(), 3)
        comm.charge_compute(10)
        return order

    run = simulate(body, num_workers=4, network=NETWORK, costs=fixed(server=0.01))
    assert run[0] == [(1, 0.001), (2, 0.011), (3, 0.021)], "served one after the other"
    assert list(run)[1:] == [0.011, 0.021, 0.031], "answers leave when the work is done"


def test_drain_returns_when_the_last_handler_is_done() -> None:
    def body() -> float:
        comm = current.provided()
        comm.serve("a", lambda src, m: local_work.charge(WorkKind.SERVER, "test", 1, lambda: lambda: None))
        comm.barrier().wait()
        comm.post(0, "a", Message())
        comm.drain()
        return float(comm.now())

    run = simulate(body, num_workers=3, network=NETWORK, costs=fixed(server=0.5))
    assert min(run) == pytest.approx(1.5, abs=0.01)


def test_a_slow_worker_encodes_slowly_and_evaluation_is_free() -> None:
    def body() -> Any:
        comm, codec = current.provided(), codecs.make("int8")
        codec.encode(torch.ones(10), {})
        own_s = comm.now()
        with comm.off_clock():
            codec.encode(torch.ones(10), {})
        return own_s, comm.now() - own_s

    run = simulate(
        body, num_workers=2, speeds=[1.0, 0.5], faults="slow(rank=0, factor=3)", costs=fixed(encode=1)
    )
    assert [own for own, _ in run] == pytest.approx([3.0, 3.0]) or [own for own, _ in run] == [3.0, 2.0]
    assert run.work_s == [{"encode": 3.0}, {"encode": 2.0}]


@pytest.mark.parametrize(
    "strategy",
    [
        "parameter_server(codec=error_feedback(codec=int8))",
        "parameter_server(shards=2, staleness=fasgd+softsync(c=2))",
        "decentralized_threshold(density=0.01)",
        "diloco(period=2)",
        "streaming_diloco(period=4, codec=int8)",
        "gossip",
    ],
)
def test_the_same_costs_give_the_same_run_and_slower_machines_a_longer_one(strategy: str) -> None:
    def run(costs: Any) -> SimulatedRun:
        return workbench.train(strategy, num_workers=3, steps=8, numel=2000, dtype=torch.float32, costs=costs)

    measured = WorkCosts()
    first = run(measured)
    again = run(WorkCosts(measured.used(), measure=None))
    assert first.log.digest() == again.log.digest() and first.seconds == again.seconds
    assert run("measured").log.digest() == first.log.digest(), "measured once per process"
    free = run("none")
    assert free.seconds < first.seconds
    doubled = {name: {n: 2 * s for n, s in sizes.items()} for name, sizes in measured.used().items()}
    assert run(WorkCosts(doubled)).seconds > first.seconds
    assert free.log.digest() == run("none").log.digest()


def test_costs_are_used_up_to_two_digits_and_timed_only_once() -> None:
    rehearsed = 0

    def rehearsal() -> Any:
        nonlocal rehearsed
        rehearsed += 1
        return lambda: time.sleep(0.004)

    costs = WorkCosts()
    seconds = [costs.seconds("encode once", 7, rehearsal) for _ in range(3)]
    before = rehearsed
    assert (
        WorkCosts().seconds("encode once", 7, rehearsal) == seconds[0] == seconds[2] and rehearsed == before
    )
    assert seconds[0] >= 0.004 and float(f"{seconds[0]:.2g}") == seconds[0]
    assert costs.used() == {"encode once": {"7": seconds[0]}}


@pytest.mark.parametrize(
    "known",
    [
        {"a": {"1": -1.0}},
        {"a": {"1": "x"}},
        {"a": {"b": 1.0}},
        {"a": 3},
        [1],
        {"a": {"1": True}},
        {"a": {"1": 10**400}},
    ],
)
def test_wrong_costs_are_refused(known: Any) -> None:
    with pytest.raises(ConfigError):
        WorkCosts(known)


def test_unknown_names_of_costs_are_refused() -> None:
    with pytest.raises(ConfigError):
        work_costs.make("free")
