"""Build, test and measure on one GPU, without a network: `make gpu`.

    python benchmarks/gpu/run.py                 everything: at most 8 minutes
    python benchmarks/gpu/run.py --only codecs   one stage: tests, codecs, training, collectives

The package is built from the tree for the Python that runs this, into build/gpu; torch, Triton, nanobind,
scikit-build-core, CMake and pytest must be there. Results go to --json, a short table to the terminal. Exit
code 0 if all ran and all tests passed, 1 if not, 2 without a GPU. Running it again is safe.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SITE = ROOT / "build" / "gpu"
MEASUREMENTS = ("codecs", "collectives", "training")
RESERVE_S = {"codecs": 60.0, "collectives": 30.0, "training": 90.0}
"""What is kept for measurements when tests take long."""


def gpu() -> dict[str, Any] | None:
    """Name and numbers of the first GPU, None if there is none."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
    }


def _version(package: str) -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def call(command: list[str], limit_s: float, log: Path) -> tuple[int, float]:
    """Run in a process group of its own, output to `log`; (exit code, seconds). 124: it was stopped."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SITE), str(ROOT / "tests" / "gpu")])}
    environment.pop("TRITON_INTERPRET", None)
    start = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            code = 124
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
    return code, time.monotonic() - start


def build(limit_s: float, folder: Path) -> None:
    """Compile the core and install the package into build/gpu; SystemExit with the log's end if it fails."""
    os.environ.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count()))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps"]
    log = folder / "build.log"
    code, seconds = call([*command, "--no-index", "--upgrade", "--target", str(SITE), "."], limit_s, log)
    if code:
        sys.exit(f"the build failed:\n{log.read_text()[-3000:]}")
    print(f"built in {seconds:.0f} s", flush=True)


def tests(limit_s: float, folder: Path) -> dict[str, Any]:
    """The tests marked gpu, as far as they came: counts, and the names of those that failed."""
    log = folder / "tests.log"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu", "tests/codecs/device", "-v"]
    command += ["-n", "5", "-p", "no:cacheprovider", "--timeout", "100", "-rN"]
    code, seconds = call(command, limit_s, log)
    output = log.read_text()
    lines = re.findall(r"^\[gw\d+\] \[ *\d+%\] ([A-Z]+) (.*?) *$", output, re.MULTILINE)
    outcomes = {name: outcome for outcome, name in lines}
    counts = {kind.lower(): list(outcomes.values()).count(kind) for kind in ("PASSED", "SKIPPED")}
    failed = sorted(name for name, outcome in outcomes.items() if outcome in ("FAILED", "ERROR"))
    collected = re.search(r"\[(\d+) items\]", output)
    total = int(collected.group(1)) if collected else None
    return {"exit_code": code, "seconds": round(seconds, 1), "collected": total, **counts, "failed": failed}


def measure(name: str, limit_s: float, folder: Path) -> dict[str, Any]:
    """Run one of the measuring scripts beside this one; its JSON."""
    target, log = folder / f"{name}.json", folder / f"{name}.log"
    target.unlink(missing_ok=True)
    command = [sys.executable, str(HERE / f"{name}.py"), "--json", str(target)]
    code, seconds = call(command, limit_s, log)
    print(log.read_text().rstrip(), flush=True)
    found: dict[str, Any] = json.loads(target.read_text()) if target.exists() else {}
    return {"exit_code": code, "seconds": round(seconds, 1), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--limit-s", type=float, default=470.0, help="end by then, whatever is left to do")
    parser.add_argument("--only", choices=("tests", *MEASUREMENTS), action="append")
    parser.add_argument("--json", type=Path, default=ROOT / "runs" / "gpu" / "results.json")
    options = parser.parse_args()
    end = time.monotonic() + options.limit_s
    hardware = gpu()
    if hardware is None:
        print(
            "make gpu: no CUDA device, or torch cannot use it: nothing was built or run.\n"
            "The kernels' tests run without one, through Triton's interpreter: pytest tests/codecs/device",
            file=sys.stderr,
        )
        sys.exit(2)
    print(" · ".join(f"{k} {v}" for k, v in hardware.items()), flush=True)
    folder = options.json.parent
    folder.mkdir(parents=True, exist_ok=True)
    wanted = options.only or ["tests", *MEASUREMENTS]
    build(end - time.monotonic(), folder)
    results: dict[str, Any] = {"hardware": hardware}
    for stage in wanted:
        later = sum(RESERVE_S[s] for s in wanted[wanted.index(stage) + 1 :])
        limit_s = end - time.monotonic() - later
        if limit_s < 5:
            results[stage] = {"exit_code": 124, "error": "no time was left"}
            continue
        results[stage] = tests(limit_s, folder) if stage == "tests" else measure(stage, limit_s, folder)
        if stage == "tests":
            shown = {k: v for k, v in results[stage].items() if k != "failed"}
            print(f"tests: {shown}", *results[stage].get("failed", []), sep="\n  ", flush=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    sys.exit(0 if all(results[stage]["exit_code"] == 0 for stage in wanted) else 1)


if __name__ == "__main__":
    main()
