"""Help, lists and refusals come without torch, whose import takes longer than all else that they do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

START = """
import sys
from paceline.cli.main import main
try:
    main()
except SystemExit as end:
    code = end.code
else:
    code = 0
assert "torch" not in sys.modules, "torch was imported"
sys.exit(code)
"""
SCRIPT = __file__
REFUSED = {
    "no number": ["run", "-n", "x", "t.py"],
    "no workers": ["run", "-n", "0", SCRIPT],
    "no nodes": ["run", "--nodes", "0", SCRIPT],
    "no threads": ["run", "--threads", "0", SCRIPT],
    "missing script": ["run", "missing.py"],
    "missing module": ["run", "-m", "no.such.module"],
    "unknown option": ["run", "--bogus", SCRIPT],
    "unknown command": ["rum", SCRIPT],
    "unknown engine": ["run", "--on", "abacus", SCRIPT],
    "unknown engine option": ["run", "-o", "queue=a", SCRIPT],
    "unknown strategy": ["run", "--strategy", "al_reduce", SCRIPT],
    "unknown argument": ["run", "--strategy", "local_sgd(perod=3)", SCRIPT],
    "unknown codec": ["run", "--strategy", "local_sgd(codec=topk(dens=0.1))", SCRIPT],
    "unknown policy": ["run", "--strategy", "parameter_server(staleness=invers)", SCRIPT],
    "broken strategy": ["run", "--strategy", "local_sgd(period=", SCRIPT],
    "unknown fabric": ["run", "--fabric", "pigeon", SCRIPT],
    "unknown log format": ["run", "--log-to", "tsv", SCRIPT],
    "unknown resource": ["run", "--resources", "disks=1", SCRIPT],
    "variable without a value": ["run", "--env", "NO_SUCH_VARIABLE", SCRIPT],
    "no rendezvous": ["run", "--nodes", "2", SCRIPT],
    "rendezvous without an address": ["run", "--rendezvous", "host.invalid:1", SCRIPT],
    "unreadable secret": ["run", "--secret-file", "/nonexistent", SCRIPT],
    "more workers than asked for": ["run", "--min-workers", "2", SCRIPT],
    "missing folder": ["run", "--workdir", "/nonexistent", SCRIPT],
    "missing interface": ["run", "--interface", "eth99", SCRIPT],
    "empty name": ["run", "--name", " ", SCRIPT],
    "checkpoint below a file": ["run", "--checkpoint", f"{SCRIPT}/c", SCRIPT],
    "log below a file": ["run", "--log-dir", f"{SCRIPT}/c", SCRIPT],
    "missing plug-in": ["run", "--plugin", "missing.py", SCRIPT],
    "manifest without image": ["manifest", SCRIPT],
    "unknown kind of manifest": ["manifest", "--image", "i", "--kind", "pod", SCRIPT],
    "name that Kubernetes refuses": ["manifest", "--image", "i", "--name", "A_B", SCRIPT],
    "unknown task": ["compare", "digitz"],
    "missing task": ["compare", "missing.py"],
    "missing data": ["compare", "mnist", "--data", "/nonexistent"],
    "comparison without workers": ["compare", "digits", "-n", "0"],
    "comparison with a wrong rate": ["compare", "digits", "--learning-rate", "-1"],
    "comparison with a wrong share": ["compare", "digits", "--validation", "2"],
    "comparison over an unknown fabric": ["compare", "digits", "--fabric", "pigeon"],
    "comparison of an unknown strategy": ["compare", "digits", "--strategies", "single,al_reduce"],
    "recording without a server": ["compare", "digits", "--record", "order.json"],
    "missing recording": [
        "compare",
        "digits",
        "--strategies",
        "parameter_server",
        "--replay",
        "/nonexistent",
    ],
    "faults without a simulation": ["compare", "digits", "--faults", "kill(rank=0, at_s=1)"],
    "unknown faults": ["compare", "digits", "--simulate", "2", "--faults", "rain(rank=0)"],
    "unknown network": ["compare", "digits", "--simulate", "2", "--network", "tokenring"],
    "unknown compute times": ["compare", "digits", "--simulate", "2", "--compute", "zipf(a=1)"],
    "missing costs": ["compare", "digits", "--simulate", "2", "--codec-cost", "/nonexistent"],
    "examination without ranks": ["doctor", "-n", "0"],
    "port that is none": ["doctor", "--hosts", "localhost:x"],
    "nothing to clean": ["doctor", "--clean", "/nonexistent"],
    "unknown operation": ["bench", "collectives", "--operations", "al_reduce"],
    "unknown fabric of a benchmark": ["bench", "collectives", "--fabrics", "pigeon"],
    "size that is none": ["bench", "collectives", "--sizes", "much"],
    "no images": ["bench", "imagenet"],
    "images for an unknown strategy": ["bench", "imagenet", "--synthetic", "--strategies", "al_reduce"],
    "unknown error": ["errors", "PL99"],
    "unknown algorithm": ["schedule", "show", "rign"],
}
PRINTED = {
    "version": ["--version"],
    "help": ["--help"],
    **{
        f"help of {c}": [c, "--help"]
        for c in ("run", "compare", "manifest", "strategies", "codecs", "doctor")
    },
    "help of benchmarks": ["bench", "imagenet", "--help"],
    "help of schedules": ["schedule", "compare", "--help"],
    "list of strategies": ["strategies"],
    "list of errors": ["errors"],
    "explanation of an error": ["errors", "PL03"],
    "list of codecs": ["codecs", "--json"],
    "list of algorithms": ["schedule", "list"],
    "preview": ["run", "--on", "local", "--dry-run", SCRIPT],
}


def start(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", START, *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=folder,
    )


@pytest.mark.parametrize("arguments", REFUSED.values(), ids=list(REFUSED))
def test_mistakes_are_told_without_torch(arguments: list[str], tmp_path: Path) -> None:
    done = start(arguments, tmp_path)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir()), "a command that is refused leaves something behind"


@pytest.mark.parametrize("arguments", PRINTED.values(), ids=list(PRINTED))
def test_what_is_only_printed_needs_no_torch(arguments: list[str], tmp_path: Path) -> None:
    done = start(arguments, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout
