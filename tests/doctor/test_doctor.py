"""`paceline doctor` on one host: what it finds when something is wrong."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from paceline.doctor import finding, host, link, network
from paceline.doctor.finding import Finding

DOCTOR = [sys.executable, "-m", "paceline.cli.main", "doctor"]


def doctor(*words: str, before: str = "", **more: str) -> subprocess.CompletedProcess[str]:
    command = [*DOCTOR, *words]
    if before:
        command = ["bash", "-c", f'{before}; exec "$@"', "bash", *command]
    return subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=90, env={**os.environ, **more}
    )


def found(report: dict[str, Any], check: str) -> list[dict[str, Any]]:
    return [f for f in report["findings"] if f["check"] == check]


@pytest.mark.xdist_group("processes")
def test_ranks_on_this_host() -> None:
    done = doctor("--workers", "2", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert found(report, "rendezvous")[0]["status"] == "ok"
    (there, back) = report["links"]
    assert 0 < there["latency_s"] < 1 and there["bytes_per_s"] > 1e6 and abs(back["skew_s"]) < 1
    assert found(report, "versions")[0]["values"]["torch"].startswith("2.")
    assert {f["check"] for f in report["findings"]} >= {
        "interfaces", "core", "shared segments", "shared memory", "open files", "cores", "clocks",
    }  # fmt: skip


def test_a_small_file_limit_and_a_name_that_nobody_knows() -> None:
    done = doctor("--hosts", "no-such-host.invalid", before="ulimit -n 100")
    assert done.returncode == 1
    assert "PROBLEM  open files: open files: 100 allowed" in done.stdout
    assert "'no-such-host.invalid' cannot be resolved" in done.stdout
    fixes = done.stdout.split("What to fix:")[1]
    assert "ulimit -n" in fixes and "/etc/hosts" in fixes


def test_too_many_threads_and_ranks() -> None:
    cores = len(os.sched_getaffinity(0))
    crowded = {f.check: f for f in host.examine(local_ranks=cores + 1, environment={})}["cores"]
    assert crowded.status == "warning" and "start at most" in crowded.fix
    busy = {f.check: f for f in host.examine(environment={"OMP_NUM_THREADS": str(cores * 4)})}["cores"]
    assert busy.status == "warning" and "OMP_NUM_THREADS=" in busy.fix


def test_ports() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        number = server.getsockname()[1]
        assert network.port("127.0.0.1", number).values["outcome"] == "open"
    closed = network.port("127.0.0.1", number)
    assert closed.status == "note" and closed.values["outcome"] == "closed"


def test_names_and_routes() -> None:
    assert network.resolve("127.0.0.1") == ("127.0.0.1", Finding("name", "ok", "127.0.0.1 is an address"))
    assert network.route("127.0.0.1").values["interface"] == "lo"
    assert network.resolve("localhost")[1].status == "ok"


def test_a_stranger_learns_nothing() -> None:
    listener = link.LinkResponder(b"right", "127.0.0.1")
    try:
        wrong = link.measure("127.0.0.1", listener.port, b"wrong")
        assert [f.status for f in wrong] == ["problem"]
        right = link.measure("127.0.0.1", listener.port, b"right")
        assert [f.check for f in right] == ["clocks", "latency", "bandwidth"]
    finally:
        listener.close()


def test_clocks_that_differ() -> None:
    assert link.judge_clock(0.2, 0.001).status == "ok"
    assert link.judge_clock(-3.0, 0.001).status == "warning"
    assert link.judge_clock(3.0, 2.5).status == "ok"  # too uncertain to complain


def test_the_worst_decides() -> None:
    some = [Finding("a", "ok", ""), Finding("b", "warning", ""), Finding("c", "note", "")]
    assert finding.worst(some) == "warning" and finding.exit_code(some) == 0
    assert finding.exit_code([*some, Finding("d", "problem", "")]) == 1
    assert finding.worst([]) == "ok"


def test_a_foreign_segment_that_cannot_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_PEEK", "raise PermissionError('Operation not permitted')")
    refused = {f.check: f for f in host.examine()}["shared segments"]
    assert refused.status == "problem" and "Operation not permitted" in refused.message
    assert "--fabric torch" in refused.fix


def test_bad_options(tmp_path: Path) -> None:
    done = doctor("--workers", "0")
    assert done.returncode == 2 and "--workers >= 1" in done.stderr
