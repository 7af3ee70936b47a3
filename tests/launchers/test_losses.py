"""A worker that dies, stops, sleeps, loops or leaves in the middle of training: the job ends or goes on."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "tools" / "faults" / "script.py"
FAULTS = [
    "stop",
    *(pytest.param(fault, marks=pytest.mark.slow) for fault in ("kill", "sleep", "loop", "leave")),
]
LIMIT_S = 80.0  # three times the deadline of five seconds, and the start of three processes on a busy machine


def run(fault: str, strategy: str, *options: str, phase: str = "train") -> tuple[int, str]:
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "paceline.cli.main", "run", "-n", "3", *options),
                *(str(SCRIPT), fault, phase, "1", strategy, "5.0", folder),
            ],
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
    assert time.monotonic() - began < LIMIT_S, done.stdout
    return done.returncode, done.stdout


@pytest.mark.parametrize("strategy", ["parameter_server", "gossip"])
@pytest.mark.parametrize("fault", FAULTS)
def test_the_others_go_on(fault: str, strategy: str) -> None:
    code, output = run(fault, strategy, "--min-workers", "2")
    assert code == 0, output
    assert "rank 0 is through" in output and "rank 2 is through" in output
    assert "rank 1 is through" not in output
    assert "continuing without rank 1: 2 of 3 workers live" in output
    if fault == "leave":
        assert "rank 1 left in the middle of training, exit code 0" in output


@pytest.mark.parametrize("strategy", ["parameter_server", "gossip", "all_reduce"])
@pytest.mark.parametrize("fault", FAULTS)
def test_without_permission_to_go_on_the_job_ends(fault: str, strategy: str) -> None:
    code, output = run(fault, strategy)
    assert code != 0, output
    assert "rank 1" in output, output


def test_a_method_that_cannot_go_on_is_refused_before_it_trains() -> None:
    code, output = run("kill", "all_reduce", "--min-workers", "2")
    assert code != 0, output
    assert "strategy all_reduce: it cannot go on without a lost worker, as --min-workers 2" in output
    assert "use parameter_server, gossip or decentralized_threshold, or leave --min-workers out" in output
    assert "continuing without" not in output


@pytest.mark.parametrize("phase", ["init", "prepare"])
def test_a_loss_before_the_ranks_can_go_on_is_not_told_as_survived(phase: str) -> None:
    code, output = run("kill", "gossip", "--min-workers", "2", phase=phase)
    assert code != 0, output
    assert "continuing without" not in output
    assert "rank 1 of 3" in output and "SIGKILL" in output


@pytest.mark.parametrize("fault", FAULTS)
def test_gloo_names_the_rank_at_fault_too(fault: str) -> None:
    code, output = run(fault, "all_reduce", "--fabric", "torch")
    assert code != 0, output
    errors = [line for line in output.splitlines() if "paceline.errors." in line]
    assert all("rank 1 (host " in line for line in errors), output
    assert "rank 1 of 3" in output or errors, output  # of a stopped one the launcher may be the first to know


@pytest.mark.parametrize("fabric", ["native", pytest.param("torch", marks=pytest.mark.slow)])
def test_a_worker_that_hangs_while_it_leaves_is_ended(fabric: str) -> None:
    code, output = run("sleep", "all_reduce", "--fabric", fabric, phase="close")
    assert code != 0, output
    assert "rank 1 hangs while it leaves the job: after 10 s" in output
    assert "time.sleep(600)" in output
    assert "rank 1 of 3" in output
