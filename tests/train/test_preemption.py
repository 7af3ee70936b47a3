"""SIGTERM to one rank that waits in a collective: all stop after the same step, and a new run continues."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("processes")
SCRIPT = Path(__file__).with_name("preempted_script.py")


@contextlib.contextmanager
def ranks(folder: Path, strategy: str) -> Iterator[list[subprocess.Popen[str]]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    started = []
    for rank in range(2):
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
        environment = {**os.environ, **place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, str(SCRIPT), str(folder), strategy]
        started.append(
            subprocess.Popen(
                command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        )
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait(10)


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    return [(p.returncode, *texts) for p in processes for texts in [p.communicate(timeout=120)]]


@pytest.mark.parametrize(
    "strategy", ["all_reduce", pytest.param("local_sgd(period=5)", marks=pytest.mark.slow)]
)
def test_sigterm_saves_and_the_next_run_continues(tmp_path: Path, strategy: str) -> None:
    with ranks(tmp_path / "undisturbed", strategy) as processes:
        undisturbed = finish(processes)
    assert [code for code, *_ in undisturbed] == [0, 0], undisturbed
    assert not (tmp_path / "undisturbed").exists()

    with ranks(tmp_path / "checkpoint", strategy) as processes:
        assert processes[0].stdout is not None
        for line in processes[0].stdout:
            if line == "step 15\n":  # inside the second epoch
                processes[1].send_signal(signal.SIGTERM)
                break
        stopped = finish(processes)
    assert [code for code, *_ in stopped] == [75, 75], stopped
    assert "SIGTERM: saved" in stopped[0][2]
    assert "digest" not in stopped[0][1]
    assert (tmp_path / "checkpoint" / "manifest.json").exists()

    with ranks(tmp_path / "checkpoint", strategy) as processes:
        resumed = finish(processes)
    assert "resumed from" in resumed[0][1], resumed
    assert resumed[0][1].count("step") < 40
    digests = {text.splitlines()[-1] for _, text, _ in [*undisturbed, *resumed]}
    assert len(digests) == 1 and digests.pop().startswith("digest"), (undisturbed, resumed)
