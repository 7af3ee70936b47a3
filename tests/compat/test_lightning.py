"""Lightning's Trainer and Fabric, the real ones, with our strategies on two ranks."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lightning", reason="needs the extra lightning")

import lightning_bodies as bodies

import paceline
from paceline.compat.lightning import PacelineStrategy
from paceline.errors import ConfigError

pytestmark = [pytest.mark.engines, pytest.mark.xdist_group("processes")]

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("spec", ["all_reduce", "local_sgd(period=5)"])
def test_checkpoints_validation_and_loggers(tmp_path: Path, spec: str) -> None:
    """Period 5 does not divide an epoch's 6 steps: the ranks differ whenever a checkpoint is saved."""
    results = paceline.launch(bodies.everything, num_workers=2, args=(str(tmp_path), spec))
    first, second = results
    assert first["whole"] == second["whole"]  # synchronised at the end
    assert first["resumed"] == first["whole"] == second["resumed"]  # bit for bit
    assert first["validated"] == second["validated"]  # every rank validates the consensus model
    if spec == "all_reduce":
        assert first["saved"] == first["whole"]
    assert first["stats"]["steps"] == 24 and first["stats"]["samples"] == 4 * 96
    rows = list(csv.DictReader((tmp_path / "whole" / "log" / "metrics.csv").open()))
    sent = [float(row["paceline/payload_bytes"]) for row in rows if row.get("paceline/payload_bytes")]
    assert len(sent) == 12 and sum(sent) > 0
    assert any(row.get("paceline/wait_s") for row in rows)


def test_all_reduce_is_what_ddp_computes(tmp_path: Path) -> None:
    """With clipping, and gradients accumulated over two batches."""
    for result in paceline.launch(bodies.beside_ddp, num_workers=2, args=(str(tmp_path), 2)):
        assert result["ours"] == pytest.approx(result["theirs"], rel=1e-5, abs=1e-7)


def test_fabric_saves_and_resumes(tmp_path: Path) -> None:
    first, second = paceline.launch(
        bodies.with_fabric, num_workers=2, args=(str(tmp_path), "local_sgd(period=2)")
    )
    assert first["whole"] == second["whole"] == first["resumed"] == second["resumed"]


def test_a_wrong_strategy_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="local_sgd"):
        PacelineStrategy("local_sdg(period=4)")
    with pytest.raises(ConfigError, match="begins with"):
        PacelineStrategy().job  # noqa: B018


@pytest.mark.parametrize(
    ("example", "strategy"),
    [
        ("lightning_digits.py", "local_sgd(period=4)"),
        ("accelerate_digits.py", "all_reduce"),
        ("accelerate_digits.py", "parameter_server"),
    ],
)
def test_examples_reach_their_accuracy(tmp_path: Path, example: str, strategy: str) -> None:
    words = [sys.executable, "-m", "paceline.cli.main", "run", "-n", "2", "--no-progress"]
    words += [str(ROOT / "examples" / example), "--epochs", "8", "--strategy", *strategy.split()]
    words += ["--folder", str(tmp_path)] if example.startswith("lightning") else []
    done = subprocess.run(
        words, check=False, capture_output=True, text=True, timeout=150, cwd=tmp_path, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if "accuracy" in line]
    assert float(lines[-1].split("accuracy ")[1]) >= 0.95, json.dumps(lines)
