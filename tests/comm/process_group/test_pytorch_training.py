"""Unmodified PyTorch training gives the losses that it gives over gloo."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import c10d_training
import pytest
from c10d_ranks import run

ROOT = Path(__file__).resolve().parents[3]
pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("processes"), pytest.mark.timeout(400)]


@functools.cache
def everything(backend: str, size: int) -> list[dict[str, Any]]:
    try:
        return run(size, c10d_training.run_all, backend=backend, timeout_s=120, limit_s=240)
    except AssertionError as error:
        return [dict.fromkeys([*c10d_training.BODIES, *c10d_training.ONLY_FOUR], str(error))]


def compare(name: str, size: int) -> None:
    expected, got = ([r[name] for r in everything(b, size)] for b in ("gloo", "paceline"))
    assert not any(isinstance(losses, str) for losses in got), got
    assert not any(isinstance(losses, str) for losses in expected), expected
    for theirs, ours in zip(expected, got, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", c10d_training.BODIES)
def test_two_ranks(name: str) -> None:
    compare(name, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*c10d_training.BODIES, *c10d_training.ONLY_FOUR])
def test_four_ranks(name: str) -> None:
    compare(name, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "ranks", "options"),
    [
        ("ddp", 2, []),
        ("fsdp2", 2, []),
        ("fsdp2", 4, ["--replicas", "2"]),
        ("pipeline_hybrid", 2, []),
        ("pipeline_hybrid", 4, []),
    ],
)
def test_example(script: str, ranks: int, options: list[str]) -> None:
    losses = {}
    for backend in ("gloo", "paceline"):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        if backend == "gloo":
            command.append(str(ROOT / "tests" / "tools" / "leave_at_once.py"))
        command += [str(ROOT / "examples" / f"{script}.py"), "--backend", backend, *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=150, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        losses[backend] = [float(x) for x in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert len(losses["paceline"]) >= 10
    assert losses["paceline"] == pytest.approx(losses["gloo"], rel=1e-4)
    assert losses["paceline"][-1] < losses["paceline"][0]
