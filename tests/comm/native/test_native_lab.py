"""The native fabric between hosts that are network namespaces."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from netlab import Lab, why_not

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.net,
    pytest.mark.skipif(bool(why_not()), reason=why_not() or ""),
    pytest.mark.xdist_group("processes"),
]
WORKER = str(Path(__file__).with_name("lab_worker.py"))


def start(lab, hosts, what, timeout_s, master, **more):
    """One rank on each host of the list `hosts`, in that order."""
    ranks = []
    for r, h in enumerate(hosts):
        place = {"RANK": r, "WORLD_SIZE": len(hosts), "MASTER_ADDR": master, "MASTER_PORT": 7000}
        place |= {"LOCAL_RANK": hosts[:r].count(h), "LOCAL_WORLD_SIZE": hosts.count(h)}
        environment = {k: str(v) for k, v in (place | more).items()}
        argv = [sys.executable, WORKER, what, str(timeout_s)]
        ranks.append(lab.popen(h, argv, env=environment, stdout=subprocess.PIPE, text=True))
    return ranks


def results(ranks):
    outs = [rank.communicate(timeout=60)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * len(ranks)
    return [json.loads(out.splitlines()[-1]) for out in outs]


@pytest.mark.parametrize(
    "hosts",
    [[0, 1, 1], pytest.param([0, 1, 2], marks=pytest.mark.slow)],
    ids=["two on one host", "one on each"],
)
def test_operations(hosts):
    with Lab(hosts=3, rate="1gbit") as lab:
        for value in results(start(lab, hosts, "check", 30, lab.address(0))):
            assert value["wire_bytes"] > 0


@pytest.mark.slow
def test_a_slow_link_reduces_least():
    """One link at a quarter of the speed: measured, simulated, chosen by all ranks, explained."""
    with Lab(hosts=4, rate="1gbit") as lab:
        lab.set_rate(3, "250mbit")
        values = results(start(lab, [0, 1, 2, 3], "choose", 30, lab.address(0)))
    assert all(value == values[0] for value in values)
    name, text, times_s = (values[0][k] for k in ("algorithm", "text", "times_s"))
    assert name.startswith("direct(shares="), text
    weights = [int(w) for w in name.removeprefix("direct(shares=").removesuffix(")").split("/")]
    assert weights[3] < min(weights[:3]), text
    assert "links differ" in text and "Mbit/s" in text
    assert times_s[name] < times_s["ring"], text


@pytest.mark.slow
@pytest.mark.parametrize("wanted", ["eth0,eth1", "fd77:0::{}", "eth1"])
def test_rails_and_ipv6(wanted):
    """The meeting is over IPv4 on the first rail; the data goes where `interface` says."""
    with Lab(hosts=2, rails=2, rate="1gbit") as lab:
        before = [bytes_of(lab, rail) for rail in range(2)]
        ranks = []
        for h in range(2):
            more = {"PACELINE_INTERFACE": wanted.format(h + 1)}
            place = {"RANK": h, "WORLD_SIZE": 2, "MASTER_ADDR": lab.address(0), "MASTER_PORT": 7000}
            environment = {k: str(v) for k, v in (place | more).items()}
            argv = [sys.executable, WORKER, "carry", "30"]
            ranks.append(lab.popen(h, argv, env=environment, stdout=subprocess.PIPE, text=True))
        results(ranks)
        moved = [bytes_of(lab, rail) - before[rail] for rail in range(2)]
    used = [
        share > sum(moved) / 8 for share in moved
    ]  # two equal rails: whichever is free takes the next slice
    assert used == [wanted != "eth1", "eth1" in wanted], moved
    assert sum(moved) > 64 << 20, moved


def bytes_of(lab, rail):
    return int(lab.run(0, ["cat", f"/sys/class/net/eth{rail}/statistics/tx_bytes"]))


@pytest.mark.parametrize(
    ("hosts", "how", "error"),
    [
        ([0, 1, 2], signal.SIGKILL, "PeerLost"),
        pytest.param([0, 1, 2], signal.SIGSTOP, "Timeout", marks=pytest.mark.slow),
        pytest.param([0, 0, 1, 1], signal.SIGKILL, "PeerLost", marks=pytest.mark.slow),
        pytest.param([0, 0, 1, 1], signal.SIGSTOP, "Timeout", marks=pytest.mark.slow),
    ],
)
def test_all_survivors_name_the_lost_rank(hosts, how, error):
    with Lab(hosts=3) as lab:
        ranks = start(lab, hosts, "go_on", 3, lab.address(0))
        for rank in ranks:
            assert rank.stdout.readline().strip() == "up"
        ranks[1].send_signal(how)
        survivors = [rank for r, rank in enumerate(ranks) if r != 1]
        for value in results(survivors):
            assert value["error"] == error
            assert "rank 1" in value["text"], value
