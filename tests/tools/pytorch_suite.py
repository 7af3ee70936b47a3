"""PyTorch's own distributed tests over gloo and over this backend, side by side.

    python tests/tools/pytorch_suite.py run --backend paceline --json runs/pytorch_paceline.json
        [--only NAME …]
    python tests/tools/pytorch_suite.py run --backend gloo --json runs/pytorch_gloo.json
    python tests/tools/pytorch_suite.py table runs/pytorch_gloo.json runs/pytorch_paceline.json

`run` adds to the file what it does not hold yet, and stops after --seconds, so it can go in pieces. Each test
has three ranks, as PyTorch runs them. `table` exits with 1 if a test passes with gloo and not with paceline.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import time
import unittest
from pathlib import Path


def run(backend: str, path: Path, only: list[str], seconds: float, again: bool) -> None:
    os.environ.update(BACKEND=backend, WORLD_SIZE="3", OMP_NUM_THREADS="1")
    os.environ.setdefault("TEMP_DIR", "/tmp")
    if backend == "gloo":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    sys.path.insert(0, str(Path(__file__).parent))
    os.environ["PYTHONPATH"] = f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"
    from pytorch_suite_cases import PyTorchDistributedTest as Case

    known: dict[str, dict[str, object]] = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    names = only or unittest.TestLoader().getTestCaseNames(Case)
    end = time.monotonic() + seconds
    for name in names:
        if time.monotonic() > end or (name in known and not again):
            continue
        start = time.monotonic()
        for _ in range(3):
            result = unittest.TextTestRunner(stream=io.StringIO(), verbosity=0).run(Case(name))
            problems = [text for _, text in result.failures + result.errors]
            # PyTorch's test ranks meet through files for at most 10 s: too little on a busy machine.
            if not any('RuntimeError("barrier timeout")' in text for text in problems):
                break
        state = "failed" if problems else "skipped" if result.skipped else "passed"
        why = problems[0][-3000:] if problems else result.skipped[0][1] if result.skipped else ""
        known[name] = {"state": state, "seconds": round(time.monotonic() - start, 1), "why": why}
        path.write_text(json.dumps(known, indent=1, sort_keys=True))
        print(f"{state:8}{time.monotonic() - start:6.1f} s  {name}", flush=True)


def table(gloo: Path, ours: Path) -> int:
    theirs, mine = json.loads(gloo.read_text()), json.loads(ours.read_text())
    lost = []
    for name in sorted(theirs):
        a, b = theirs[name]["state"], mine.get(name, {"state": "not run"})["state"]
        if a == "passed" and b != "passed":
            lost.append(name)
        if a != b:
            print(f"{name:75} gloo {a:8} paceline {b}")
    for label, results in (("gloo", theirs), ("paceline", mine)):
        states = [r["state"] for r in results.values()]
        print(label, {s: states.count(s) for s in sorted(set(states))})
    print(f"{len(lost)} tests pass with gloo and not with paceline: {', '.join(lost) or 'none'}")
    return bool(lost)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    runner = verbs.add_parser("run")
    runner.add_argument("--backend", choices=["gloo", "paceline"], required=True)
    runner.add_argument("--json", type=Path, required=True)
    runner.add_argument("--only", nargs="*", default=[])
    runner.add_argument("--seconds", type=float, default=1e9)
    runner.add_argument("--again", action="store_true", help="also tests that the file holds")
    shower = verbs.add_parser("table")
    shower.add_argument("gloo", type=Path)
    shower.add_argument("paceline", type=Path)
    both = verbs.add_parser("both", help="run both, then print the table")
    both.add_argument("--folder", type=Path, default=Path("runs"))
    chosen = parser.parse_args()
    if chosen.verb == "run":
        run(chosen.backend, chosen.json, chosen.only, chosen.seconds, chosen.again)
        return 0
    if chosen.verb == "both":
        files = [chosen.folder / f"pytorch_{b}.json" for b in ("gloo", "paceline")]
        for backend, file in zip(("gloo", "paceline"), files, strict=True):
            command = [sys.executable, __file__, "run", "--backend", backend, "--json", str(file)]
            subprocess.run(command, check=True)
        return table(*files)
    return table(chosen.gloo, chosen.paceline)


if __name__ == "__main__":
    sys.exit(main())
