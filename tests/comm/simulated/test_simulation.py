"""The virtual cluster itself: time, order, random state, errors, compute times, faults, logs."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import paceline
from paceline.comm import current
from paceline.comm.simulated import compute_time, faults
from paceline.comm.simulated.simulate import simulate
from paceline.errors import CommError, ConfigError, Mismatch, PeerLost, Timeout
from paceline.types import Message, ReduceOp


def run(body: Callable[[Any], Any], num_workers: int = 3, **options: Any) -> Any:
    return simulate(lambda: body(current.provided()), num_workers=num_workers, **options)


def test_public_name_and_result() -> None:
    result = paceline.simulate(lambda a, b: a + b + current.provided().rank, num_workers=2, args=(1, 2))
    assert list(result) == [3, 4] and len(result) == 2 and result.seconds == 0 and result.killed == []


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("op", [ReduceOp.SUM, ReduceOp.MEAN, ReduceOp.MAX, ReduceOp.PRODUCT])
def test_collectives_are_exact(size: int, op: ReduceOp) -> None:
    inputs = [torch.arange(size * 3, dtype=torch.float64).sin() + r for r in range(size)]
    reference = {
        ReduceOp.SUM: sum(inputs),
        ReduceOp.MEAN: sum(inputs) / size,
        ReduceOp.MAX: torch.stack(inputs).amax(0),
        ReduceOp.PRODUCT: torch.stack(inputs).prod(0),
    }[op]

    def body(comm: Any) -> None:
        r, mine = comm.rank, inputs[comm.rank].clone()
        comm.all_reduce(mine, op=op).wait()
        torch.testing.assert_close(mine, reference)
        share = torch.empty(3, dtype=torch.float64)
        comm.reduce_scatter(share, inputs[r], op=op).wait()
        torch.testing.assert_close(share, reference[3 * r : 3 * r + 3])
        whole = torch.empty(size * 3 * size, dtype=torch.float64)
        comm.all_gather(whole, inputs[r]).wait()
        assert torch.equal(whole, torch.cat(inputs))
        there = torch.empty(size * 3, dtype=torch.float64)
        comm.all_to_all(there, inputs[r]).wait()
        assert torch.equal(there, torch.cat([i[3 * r : 3 * r + 3] for i in inputs]))
        root = size - 1
        out = torch.empty(size * 3 * size, dtype=torch.float64) if r == root else None
        comm.gather(out, inputs[r], root=root).wait()
        assert out is None or torch.equal(out, torch.cat(inputs))
        comm.scatter(share, inputs[root] if r == root else None, root=root).wait()
        assert torch.equal(share, inputs[root][3 * r : 3 * r + 3])
        mine = inputs[r].clone()
        comm.broadcast(mine, root=root).wait()
        assert torch.equal(mine, inputs[root])
        comm.reduce(mine, root=0).wait()
        comm.barrier().wait()

    run(body, size)


def test_v_forms_split_and_point_to_point() -> None:
    def body(comm: Any) -> float:
        r = comm.rank
        out = torch.empty(6)
        comm.all_gather_v(out, torch.full((r + 1,), float(r)), counts=[1, 2, 3]).wait()
        assert out.tolist() == [0, 1, 1, 2, 2, 2]
        part = comm.split([0, 2])
        if part is not None:
            x = torch.tensor([float(r)])
            part.all_reduce(x).wait()
            assert x.item() == 2
        if r == 0:
            comm.send(torch.tensor([7.0]), 1).wait()
        if r == 1:
            got = torch.empty(1)
            comm.recv(got).wait()
            return got.item()
        return 7.0

    assert list(run(body)) == [7.0] * 3


def test_a_minibatch_takes_its_time_and_a_collective_waits_for_the_slowest() -> None:
    def body(comm: Any) -> tuple[float, float]:
        comm.charge_compute()
        before = comm.now()
        comm.all_reduce(torch.zeros(125_000_000 // 4)).wait()
        return before, comm.now()

    result = run(body, 2, compute="constant(mean_s=2)", speeds=[1, 0.5], network="ethernet(gbit=1)")
    assert [r[0] for r in result] == [2.0, 4.0]
    assert (
        result[0][1] == result[1][1] == pytest.approx(4.0 + 1.0, rel=0.01)
    )  # 2·(P−1)/P · 125 MB at 1 Gbit/s


def test_messages_take_latency_and_bandwidth_and_share_ports() -> None:
    def body(comm: Any) -> float:
        comm.serve("x", lambda src, m: None)
        if comm.rank == 0:
            return 0.0
        comm.call(0, "x", Message({}, [torch.zeros(12_500_000, dtype=torch.uint8)])).wait()
        return float(comm.now())

    times = list(run(body, 4, network="ethernet(gbit=1, latency_us=100)"))
    # the receiver's port takes 0.1 s for each of three senders
    assert sorted(times)[1:] == pytest.approx([0.1, 0.2, 0.3], rel=0.01)


def test_random_state_belongs_to_the_worker() -> None:
    def body(comm: Any) -> list[float]:
        torch.manual_seed(comm.rank)
        np.random.seed(comm.rank)
        random.seed(comm.rank)
        out = []
        for _ in range(5):
            out += [torch.rand(1).item(), float(np.random.rand()), random.random()]
            comm.charge_compute()
        return out

    before = torch.get_rng_state()
    together = list(run(body, 3, compute="exponential"))
    assert together == [run(lambda comm, r=r: _as_rank(comm, r, body), 1)[0] for r in range(3)]
    assert torch.equal(before, torch.get_rng_state())


def _as_rank(comm: Any, rank: int, body: Callable[[Any], Any]) -> Any:
    comm.rank = rank
    comm.charge_compute = lambda share=1.0: None
    return body(comm)


def test_deadlock_names_who_waits_for_what() -> None:
    def body(comm: Any) -> None:
        if comm.rank != 1:
            comm.barrier().wait()

    with pytest.raises(CommError, match=r"deadlock.*rank 0 waits for barrier #0 \(not called by rank 1\)"):
        run(body)


def test_different_collectives_are_a_mismatch() -> None:
    def body(comm: Any) -> None:
        comm.all_reduce(torch.zeros(3 + comm.rank % 2)).wait()

    with pytest.raises(Mismatch, match="rank 1 called"):
        run(body)


def test_handler_that_waits_is_refused() -> None:
    def body(comm: Any) -> None:
        comm.serve("x", lambda src, m: comm.call(0, "x", Message()).wait())
        comm.call(1, "x", Message()).wait()

    with pytest.raises(CommError, match="handlers must not block"):
        run(body, 2)


def test_worker_that_raises_stops_the_simulation_with_its_error() -> None:
    def body(comm: Any) -> None:
        comm.charge_compute()
        if comm.rank == 1:
            raise KeyError("mine")
        comm.barrier().wait()

    with pytest.raises(KeyError, match="mine") as caught:
        run(body)
    assert "rank 1" in caught.value.__notes__[0]


def test_timeout_is_virtual() -> None:
    def body(comm: Any) -> float:
        if comm.rank == 0:
            with pytest.raises(Timeout):
                comm.barrier().wait(timeout_s=100)
        else:
            for _ in range(300):
                comm.charge_compute()
            comm.barrier().wait()
        return float(comm.now())

    assert run(body, 2, compute="constant(mean_s=1)")[0] == 100


def test_killed_worker_is_named_and_the_others_see_peer_lost() -> None:
    def body(comm: Any) -> str:
        for _ in range(10):
            comm.charge_compute()
            try:
                comm.all_reduce(torch.ones(1)).wait()
            except PeerLost as error:
                return str(error)
        return ""

    result = run(body, 4, faults="kill(rank=2, at_s=0.035)")
    assert result.killed == [2] and result[2] is None
    assert all("rank 2 is lost" in result[r] for r in (0, 1, 3))


def test_pause_slow_link_and_join_move_time_as_scripted() -> None:
    def body(comm: Any) -> float:
        comm.charge_compute()
        comm.serve("x", lambda src, m: None)
        if comm.rank == 0:
            comm.call(1, "x", Message()).wait()
        return float(comm.now())

    fast = {"compute": "constant(mean_s=1)", "network": "ethernet(gbit=1000, latency_us=0)"}
    assert run(body, 2, **fast)[0] == pytest.approx(1, abs=1e-3)
    assert run(body, 2, faults="pause(rank=1, at_s=0.5, for_s=3)", **fast)[0] == pytest.approx(3.5, abs=1e-3)
    assert run(body, 2, faults="slow(rank=0, factor=4)", **fast)[0] == pytest.approx(4, abs=1e-3)
    assert run(body, 2, faults="drop_link(src=0, dst=1, at_s=0, for_s=9)", **fast)[0] == pytest.approx(
        9, abs=1e-3
    )
    assert run(body, 2, faults="partition(ranks='1', at_s=0, for_s=8)", **fast)[0] == pytest.approx(
        8, abs=1e-3
    )
    assert run(body, 2, faults="join(rank=1, at_s=5)", **fast)[0] == pytest.approx(6, abs=1e-3)


@pytest.mark.parametrize(
    ("faults", "expected"),
    [
        ("drop_link(src=2, dst=1, at_s=0.5)", "1→2 .*since 0.5 s.*drop_link.*has no for_s"),
        ("partition(ranks='0 1', at_s=0.5)", "1→2 .*since 0.5 s.*partition.*has no for_s"),
        (
            "drop_link(src=2, dst=1, at_s=0.5, for_s=3)+partition(ranks='2', at_s=3)",
            "1→2 .*since 3 s.*partit",
        ),
    ],
)
@pytest.mark.parametrize("way", ["call", "call with a timeout", "collective"])
def test_a_link_that_is_closed_for_ever_is_named(way: str, faults: str, expected: str) -> None:
    def body(comm: Any) -> None:
        comm.serve("x", lambda src, m: None)
        group = comm.split([1, 2])
        comm.charge_compute()
        if way == "collective":
            if group is not None:
                group.all_reduce(torch.ones(3)).wait()
        elif comm.rank == 1:
            comm.call(2, "x", Message()).wait(timeout_s=7 if "timeout" in way else None)

    with pytest.raises(CommError, match=expected):
        run(body, 3, faults=faults, compute="constant(mean_s=1)")


def test_a_dropped_link_does_not_cut_a_rank_off_itself() -> None:
    def body(comm: Any) -> float:
        alone = comm.split([1])
        comm.charge_compute()
        if alone is not None:
            alone.all_reduce(torch.ones(3)).wait()
        return float(comm.now())

    faults = "drop_link(src=0, dst=1, at_s=0.5, for_s=4)"
    assert run(body, 2, faults=faults, compute="constant(mean_s=1)")[1] == pytest.approx(1, abs=0.01)
    with pytest.raises(ConfigError, match="two different ranks"):
        run(body, 2, faults="drop_link(src=1, dst=1, at_s=0)")


@pytest.mark.parametrize(
    ("text", "mean"),
    [
        ("constant(mean_s=0.02)", 0.02),
        ("normal(mean_s=0.02, std_s=0.002)", 0.02),
        ("exponential(mean_s=0.02)", 0.02),
        ("shifted_exponential(shift_s=0.01, mean_s=0.02)", 0.02),
        ("pareto(shape=3, minimum_s=0.02)", 0.03),
        ("empirical(samples='0.01 0.03')", 0.02),
    ],
)
def test_compute_times_have_their_means(text: str, mean: float) -> None:
    draw, rng = compute_time.parse(text), np.random.default_rng(0)
    assert np.mean([draw(rng) for _ in range(40_000)]) == pytest.approx(mean, rel=0.02)


@pytest.mark.parametrize(
    "text",
    [
        "gauss",
        "constant(mean_s=0)",
        "pareto(shape=1)",
        "empirical",
        "empirical(samples='a b')",
        "constant(1)",
    ],
)
def test_wrong_compute_times_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        compute_time.parse(text)


@pytest.mark.parametrize(
    "text",
    ["explode(rank=1)", "kill(rank=9, at_s=1)", "kill(rank=1)", "slow(rank=0, factor=0)", "random(kills=4)"],
)
def test_wrong_faults_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        faults.parse(text, num_workers=4, seed=0)


def test_event_log_and_trace_are_written(tmp_path: Path) -> None:
    def body(comm: Any) -> None:
        comm.charge_compute()
        comm.all_reduce(torch.zeros(1000)).wait()

    result = run(body, 3, log=str(tmp_path / "log.jsonl"), trace=str(tmp_path / "trace.json"))
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {e["kind"] for e in events} == {"compute", "collective"} and len(events) == len(
        result.log.events
    ) == 6
    trace = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert sum(e["ph"] == "X" for e in trace) == 6


def test_faults_are_in_log_and_trace_and_both_stay_plain_json(tmp_path: Path) -> None:
    def body(comm: Any) -> None:
        comm.serve("x", lambda src, m: None)
        for _ in range(3):
            comm.charge_compute()
            comm.post(1 - comm.rank, "x", Message({}, [torch.zeros(10)]))

    faults = "drop_link(src=0, dst=1, at_s=0.015)+slow(rank=1, factor=2)+join(rank=1, at_s=0.005)"
    files = {"log": str(tmp_path / "log.jsonl"), "trace": str(tmp_path / "trace.json")}
    run(body, 2, faults=faults, **files)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    events = [json.loads(line, parse_constant=refuse) for line in lines]
    named = {(e["name"], e["rank"]) for e in events if e["kind"] == "fault"}
    assert named == {("drop_link", 0), ("drop_link", 1), ("slow", 1), ("not joined", 1)}
    assert sum(e["kind"] == "lost" for e in events) == 5  # the second of rank 0 and all after it
    assert all(e["end_s"] is None or e["end_s"] >= e["start_s"] for e in events)
    rows = json.loads((tmp_path / "trace.json").read_text(), parse_constant=refuse)["traceEvents"]
    drawn = [r for r in rows if r["ph"] == "X"]
    assert len(drawn) == len(events)
    assert all({"name", "cat", "pid", "tid", "ts", "dur"} <= set(r) and r["dur"] >= 0 for r in drawn)


def test_links_serve_in_order_of_arrival() -> None:
    """A short message to a port that a long one will only reach later is not held up by it."""

    def body(comm: Any) -> float:
        came: list[float] = []
        comm.serve("x", lambda src, m: came.append(comm.now()))
        comm.barrier().wait()
        begin = comm.now()
        if comm.rank == 0:  # the second message leaves the sender's port after the first one
            comm.post(1, "x", Message({}, [torch.zeros(250_000)]))
            comm.post(2, "x", Message({}, [torch.zeros(250_000)]))
        if comm.rank == 3:
            comm.post(2, "x", Message({}, [torch.zeros(250)]))
        comm.drain()
        return min(came, default=0.0) - begin

    assert run(body, 4, network="ethernet(gbit=1)")[2] < 0.001


def test_512_workers_run() -> None:
    def body(comm: Any) -> float:
        comm.charge_compute()
        x = torch.ones(10)
        comm.all_reduce(x).wait()
        return x[0].item()

    assert set(run(body, 512, compute="exponential")) == {512.0}
