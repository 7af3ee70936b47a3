"""The tests on other Pythons and other versions of torch, each in an environment of its own.

    python tests/tools/matrix.py                                  # what `make matrix` runs
    python tests/tools/matrix.py --only 3.12/2.11.0 3.10/none     # these

By default: this Python with each version of torch, and every other Python found here without torch, where
the tests of the parts that need none run. Prints a table; exits with 1 if one failed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".matrix"
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
TORCHES = ("2.13.0", "2.14.1")
ORDINARY = "not gpu and not slow and not engines and not exhaustive"
WITHOUT_TORCH = ["tests/schedule", "tests/collectives", "tests/test_spec.py"]
LIGHT = ["numpy", "typer", "rich", "pytest>=8.2", "pytest-xdist", "pytest-timeout", "hypothesis"]


def find_python(version: str) -> str | None:
    """Path of an interpreter of this version: on the PATH, or of pyenv."""
    candidates = [shutil.which(f"python{version}") or ""]
    root = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    candidates += map(str, root.glob(f"versions/{version}.*/bin/python{version}"))
    return next((path for path in candidates if path and version_of(path) == version), None)


def version_of(path: str) -> str:
    """The version of an interpreter; "" for a stand-in of pyenv's that has none behind it."""
    command = [path, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def prepare(python: str, version: str, torch: str) -> Path:
    """Environment with the package built for this Python; returns its interpreter."""
    folder = FOLDER / f"{version}-{torch}"
    own = folder / "bin/python"
    if not own.exists():
        subprocess.run([python, "-m", "venv", str(folder)], check=True)
    install = [str(own), "-m", "pip", "install", "--quiet"]
    if torch == "none":
        subprocess.run([*install, *LIGHT], check=True)
        subprocess.run([*install, "--no-deps", "--force-reinstall", str(ROOT)], check=True)
    else:
        subprocess.run([*install, f"torch=={torch}"], check=True)
        subprocess.run([*install, f"{ROOT}[test]", f"torch=={torch}"], check=True)
    subprocess.run([str(own), "-c", "import paceline._core"], check=True)  # pip would go on without it
    return own


def tested(own: Path, torch: str, jobs: int) -> str:
    """Run the tests; returns pytest's last line, "failed" first if one did."""
    options = f"-q -n {jobs} --dist loadgroup -p no:cacheprovider"
    command = [str(own), "-m", "pytest", *options.split()]
    if torch == "none":
        command += ["--noconftest", *WITHOUT_TORCH]
    done = subprocess.run(
        [*command, "-m", ORDINARY], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False
    )
    print(done.stdout, flush=True)
    result = done.stdout.strip().splitlines()[-1].strip("= ") if done.stdout.strip() else "no output"
    return result if done.returncode == 0 else f"failed: {result}"


def cells() -> list[tuple[str, str]]:
    """Python and torch, "none" for without."""
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    others = [v for v in PYTHONS if v != here and find_python(v)]
    return [(here, torch) for torch in TORCHES] + [(v, "none") for v in others]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="PYTHON/TORCH", help="these, such as 3.12/2.11.0")
    parser.add_argument("--jobs", type=int, default=2, help="processes of pytest")
    options = parser.parse_args()
    chosen = [(v, t) for v, _, t in (o.partition("/") for o in options.only)] if options.only else cells()
    rows, has_failed = [], False
    for version, torch in chosen:
        python = find_python(version)
        if python is None:
            result = "failed: no such Python here"
        else:
            print(f"Python {version}, torch {torch}", flush=True)
            result = tested(prepare(python, version, torch), torch, options.jobs)
        has_failed |= result.startswith(("failed", "no output"))
        rows.append(f"| {version} | {torch} | {result} |")
    print("\n".join(["| Python | torch | tests |", "|---|---|---|", *rows]))
    sys.exit(has_failed)


if __name__ == "__main__":
    main()
