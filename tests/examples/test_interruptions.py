"""examples/loops/interrupted.py: stopped or killed in mid-training, it ends as if nothing had happened."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from example_loops import FOLDER, environment

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.xdist_group("processes")]
RUN = (sys.executable, "-m", "paceline", "run", "--no-progress", "-n", "2")
SCRIPT = str(FOLDER / "interrupted.py")


def started(*command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def digest(text: str) -> str:
    found = re.findall(r"digest of the parameters (\w+)", text)
    assert len(found) == 1, text
    return str(found[0])


def wait_for(process: subprocess.Popen[str], line: str) -> str:
    """What it printed up to that line."""
    assert process.stdout is not None
    seen = ""
    for one in process.stdout:
        seen += one
        if line in one:
            return seen
    raise AssertionError(seen)


@pytest.fixture(scope="module")
def undisturbed() -> str:
    return digest(started(*RUN, SCRIPT).communicate(timeout=120)[0])


def test_stopped_and_run_again(tmp_path: Path, undisturbed: str) -> None:
    command = (*RUN, "--checkpoint", str(tmp_path / "saved"), SCRIPT, "--pause", "0.05")
    stopped = started(*command)
    wait_for(stopped, "epoch 2, step 13")
    stopped.send_signal(signal.SIGTERM)
    assert "run the same command again to continue" in stopped.communicate(timeout=120)[0]
    again = started(*command).communicate(timeout=120)[0]
    assert "resumed from" in again
    assert "[0] epoch 1, step" not in again
    assert digest(again) == undisturbed


def test_a_killed_worker_and_a_restart(tmp_path: Path, undisturbed: str) -> None:
    folder = str(tmp_path / "saved")
    command = (*RUN, "--max-restarts", "2", SCRIPT, "--checkpoint", folder, "--save-every", "1")
    killed = started(*command, "--pause", "0.05")
    seen = wait_for(killed, "epoch 2, step 13")
    os.kill(int(re.findall(r"process (\d+)", seen)[0]), signal.SIGKILL)
    rest = killed.communicate(timeout=120)[0]
    assert killed.returncode == 0, rest
    assert "was killed by SIGKILL" in rest and "at epoch 1, step 10" in rest
    assert digest(rest) == undisturbed
