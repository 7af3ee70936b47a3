"""Horovod scripts, unchanged, under `paceline run --as-horovod`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent / "scripts"
SHARED = Path(os.environ.get("PACELINE_SHARED", Path(__file__).resolve().parents[3].parent / "shared"))
pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("processes")]


def run(script: str, *arguments: str, ranks: int, options: tuple[str, ...] = (), **environment: str) -> str:
    command = [sys.executable, "-m", "paceline.cli.main", "run", "--as-horovod", "-np", str(ranks), *options]
    result = subprocess.run(
        [*command, str(SCRIPTS / f"{script}.py"), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-5000:]
    return result.stdout + result.stderr


def test_every_collective() -> None:
    assert run("operations", ranks=3, PYTHONHASHSEED="1").count("all good") == 3


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(
    "script", ["engine_failures", "process_sets", "gradients", "optimizers", "join", "scaling"]
)
def test_each_rank_agrees(script: str, ranks: int) -> None:
    assert run(script, ranks=ranks).count("all good") == ranks


def test_training_equals_ddp_bit_for_bit() -> None:
    output = run("equals_ddp", ranks=2, options=("-H", "localhost:2", "--verbose"))
    assert output.count("equal bits") == 2


def test_a_rank_that_never_submits_is_named(tmp_path: Path) -> None:
    settings = {"HOROVOD_STALL_CHECK_TIME_SECONDS": "1", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "3"}
    output = run("stall", str(tmp_path), ranks=3, **settings)
    assert re.search(r"stalled: allreduce\.lonely .*for rank 1", output)
    assert len(re.findall(r"gave up: .*rank 1 did not ask", output)) == 2


def test_elastic_training_survives_the_loss_of_a_worker(tmp_path: Path) -> None:
    commit = str(tmp_path / "commit")
    output = run("elastic", ranks=2, options=("--max-restarts", "1"), HOROVOD_ELASTIC_COMMIT=commit)
    assert output.count("starts at step 0 after 0 restarts") == 2
    assert output.count("starts at step 4 after 1 restarts") == 2
    assert output.count("finished at step 10") == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_mnist_with_fp16_compression_and_two_backward_passes() -> None:
    data = SHARED / "data" / "mnist.npz"
    if not data.exists():
        pytest.skip(f"needs MNIST at {data}")
    output = run("mnist", str(data), ranks=2)
    assert float(re.search(r"accuracy ([\d.]+)", output)[1]) >= 0.97
