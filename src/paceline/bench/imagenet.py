"""The ways of `examples/imagenet/`, how each is started, and what a run of each reports."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paceline import plugins
from paceline.errors import ConfigError, PacelineError


@dataclass(frozen=True)
class Way:
    """One script, and the command that starts it for `workers` workers."""

    name: str
    script: str
    starter: str
    """"python", "torchrun", "spawn", "paceline" or "horovod"."""
    arguments: tuple[str, ...] = ()
    workers: int | None = None
    """Fixed number of workers; None: as asked for."""
    options: tuple[str, ...] = ()
    """For the launcher."""


def ways(strategies: Sequence[str]) -> list[Way]:
    """One process alone first: the others' efficiency refers to it."""
    plain = [
        Way("one process", "distributed.py", "torchrun", workers=1),
        Way("DataParallel", "dataparallel.py", "python", workers=1),
        Way("DDP, launcher", "distributed.py", "torchrun"),
        Way("DDP, spawn", "spawn.py", "spawn"),
        Way("DDP, mixed precision", "mixed_precision.py", "torchrun"),
        Way("Horovod script", "horovod_style.py", "horovod"),
    ]
    ours = [
        Way(f"Paceline {s}, {f}", "paceline_style.py", "paceline", ("--strategy", s), options=("--fabric", f))
        for f in ("torch", "native")
        for s in strategies
    ]
    return plain + ours


def command(way: Way, folder: Path, workers: int, arguments: Sequence[str]) -> list[str]:
    """Return the command line of one run."""
    script, python = str(folder / way.script), sys.executable
    rest = [*way.arguments, *arguments]
    if way.starter == "python":
        return [python, script, *rest]
    if way.starter == "spawn":
        return [python, script, "--workers", str(workers), *rest]
    if way.starter == "torchrun":
        launcher = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
        return [*launcher, script, *rest]
    own = [word for file in plugins.files() for word in ("--plugin", file)]
    paceline = [python, "-m", "paceline.cli.main", "run", "-n", str(workers), *own, *way.options]
    return [*paceline, *(["--as-horovod"] if way.starter == "horovod" else []), script, *rest]


def run(
    way: Way, folder: Path, *, workers: int, threads: int, arguments: Sequence[str], timeout_s: float
) -> dict[str, Any]:
    """Run one way once and return its row; PacelineError with the end of its output if it fails."""
    count = way.workers or workers
    # The same cores for every way: a single process may use the threads that the workers would have together.
    cores = threads if count == workers else threads * workers
    work = Path(tempfile.mkdtemp(prefix="paceline-imagenet-"))
    result = work / "row.json"
    line = command(way, folder, count, [*arguments, "--no-progress", "--json", str(result)])
    try:
        environment = {**os.environ, "OMP_NUM_THREADS": str(cores)}
        with subprocess.Popen(
            line,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            start_new_session=True,
        ) as process:
            try:
                output, _ = process.communicate(timeout=timeout_s)
            except BaseException as error:
                os.killpg(process.pid, signal.SIGTERM)
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                if isinstance(error, subprocess.TimeoutExpired):
                    raise PacelineError(f"{way.name}: not done after {timeout_s:.0f} s") from None
                raise
        if process.returncode != 0 or not result.exists():
            raise PacelineError(f"{way.name} failed with exit code {process.returncode}:\n{output[-3000:]}")
        row: dict[str, Any] = json.loads(result.read_text())
        return {**row, "way": way.name, "script": way.script}
    finally:
        shutil.rmtree(work, ignore_errors=True)


def scripts_folder(given: Path | None) -> Path:
    """Return the folder of the scripts: as given, or of the source checkout this package belongs to."""
    folder = given or Path(__file__).resolve().parents[3] / "examples" / "imagenet"
    if not (folder / "recipe.py").is_file():
        raise ConfigError(
            f"{folder} does not hold the ImageNet example scripts; give --scripts, the folder "
            f"examples/imagenet "
            "of a source checkout"
        )
    return folder
