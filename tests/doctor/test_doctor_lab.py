"""`paceline doctor` between hosts that are network namespaces: rates, delays, and broken things."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from netlab import Lab, why_not

pytestmark = [
    pytest.mark.net,
    pytest.mark.skipif(bool(why_not()), reason=why_not() or ""),
    pytest.mark.xdist_group("processes"),
]

DOCTOR = [sys.executable, "-m", "paceline.cli.main", "doctor", "--json"]
PORT = "29555"


def examine(lab: Lab, *, master: str | None = None, timeout_s: int = 30) -> list[tuple[int, dict[str, Any]]]:
    """(exit code, report) of each host's only rank; {} where nothing was printed."""
    children = []
    for rank in range(2):
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        place |= {"MASTER_ADDR": master or lab.address(0), "MASTER_PORT": PORT, "OMP_NUM_THREADS": "1"}
        words = [*DOCTOR, "--timeout", str(timeout_s)]
        children.append(
            lab.popen(rank, words, env=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    results = []
    for child in children:
        out, err = child.communicate(timeout=150)
        assert child.returncode in (0, 1), err
        results.append((child.returncode, json.loads(out) if out.strip() else {}))
    return results


def of(report: dict[str, Any], check: str, status: str) -> list[dict[str, Any]]:
    return [f for f in report["findings"] if f["check"] == check and f["status"] == status]


def test_a_slow_and_long_link_is_measured_and_explained() -> None:
    with Lab(hosts=2, rate="80mbit", delay_s=0.008) as lab:
        (code, report), (other, nothing) = examine(lab)
    assert (code, other, nothing) == (0, 0, {})
    assert [each["link"] for each in report["links"]] == ["host0 -> host1", "host1 -> host0"]
    for each in report["links"]:
        assert 0.008 <= each["latency_s"] < 0.1
        assert 2e6 < each["bytes_per_s"] < 10.5e6
    assert of(report, "bandwidth", "warning") and of(report, "latency", "warning")
    assert any("local_sgd" in fix for fix in report["fixes"])
    assert of(report, "route", "ok")[0]["values"]["interface"] == "eth0"
    assert {f["where"] for f in report["findings"] if f["check"] == "versions"} == {"host0", "host1"}


def test_a_firewall_between_the_ranks() -> None:
    """The rendezvous is open, other ports are not: the ranks meet and cannot talk."""
    with Lab(hosts=2) as lab:
        for host, other in ((0, 1), (1, 0)):
            to = f"ip rule add to {lab.address(other)} ipproto tcp"
            lab.run(host, f"{to} dport {PORT} lookup main pref 1".split())
            lab.run(host, f"{to} sport {PORT} lookup main pref 2".split())
            lab.run(host, f"{to} blackhole pref 3".split())
        (code, report), _ = examine(lab)
    assert code == 1
    assert len(of(report, "connection", "problem")) == 2
    assert any("allow all TCP" in fix for fix in report["fixes"])


def test_nobody_is_at_the_meeting_point() -> None:
    with Lab(hosts=2) as lab:
        lab.set_link(0, up=False)
        (_, first), (code, second) = examine(lab, timeout_s=4)
    assert code == 1
    assert of(second, "port", "problem") and of(second, "rendezvous", "problem")
    assert "MASTER_ADDR" in " ".join(second["fixes"])
    assert of(first, "rendezvous", "problem")


def test_a_name_that_only_this_host_knows() -> None:
    with Lab(hosts=2) as lab:
        lab.run(0, ["true"])
        _, (code, report) = examine(lab, master="somewhere.invalid", timeout_s=3)
    assert code == 1
    assert "cannot be resolved" in of(report, "name", "problem")[0]["message"]
