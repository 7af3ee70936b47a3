"""The scripts under examples/loops as users start them: alone, by `paceline run`, torchrun, -m, launch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from example_loops import EXACT, FOLDER, ROOT, environment

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.xdist_group("processes")]
CASES = [(name, arguments) for name, variants in EXACT.items() for arguments in variants]
PACELINE = (sys.executable, "-m", "paceline")
RUN = (*PACELINE, "run", "--no-progress", "-n")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
LOW_PRECISION = {"nested_batches": 2e-2, "optimizers": 5e-3}  # bfloat16; a line search in float32


def output(*command: object, text: str | None = None) -> list[str]:
    done = subprocess.run(
        [str(word) for word in command],
        input=text,
        cwd=ROOT,
        env=environment(),
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def numbers(lines: list[str]) -> list[float]:
    """Those of the final line: losses, and norms of parameters."""
    (final,) = [line for line in lines if "final loss" in line]
    return [float(one) for one in re.findall(r"\d+\.\d+", final)]


def near(ours: list[float], one: list[float], name: str) -> bool:
    tolerance = LOW_PRECISION.get(name, 1e-4)
    return len(ours) == len(one) > 1 and ours == pytest.approx(one, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_several_workers_train_as_one(name: str, arguments: str) -> None:
    script, words = FOLDER / f"{name}.py", arguments.split()
    one = numbers(output(sys.executable, script, *words))
    workers = 3 if name in ("no_loader", "lstm_packed") else 2
    assert near(numbers(output(*RUN, workers, script, *words)), one, name)


@pytest.mark.parametrize(("name", "arguments"), [("gan", ""), ("sampling", "--variant stream")])
def test_torchrun(name: str, arguments: str) -> None:
    script, words = FOLDER / f"{name}.py", arguments.split()
    one = numbers(output(sys.executable, script, *words))
    assert near(numbers(output(*TORCHRUN, script, *words)), one, name)


def test_replicas_with_sparse_gradients_are_one_model() -> None:
    script = FOLDER / "recommender.py"
    assert numbers(output(*RUN, 2, script))[0] < 0.69, "below the loss of guessing"


def test_a_launched_function_and_a_module() -> None:
    script = FOLDER / "launched.py"
    launched = output(sys.executable, script)
    assert near(numbers(launched), numbers(output(*RUN, 2, "-m", "examples.loops.launched")), "launched")
    assert sum("a worker found" in line for line in launched) == 2


def test_a_task_of_ones_own_is_compared(tmp_path: Path) -> None:
    task, results = FOLDER / "own_task.py", tmp_path / "results.json"
    output(*PACELINE, "compare", task, "--workers", 2, "--strategies", "single,all_reduce", "--json", results)
    best = re.findall(r'"best_accuracy": ([0-9.]+)', results.read_text())
    assert json.loads(results.read_text()) and len(best) >= 2
    assert len(set(best)) == 1, "both train the same, up to rounding"
