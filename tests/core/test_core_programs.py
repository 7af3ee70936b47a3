"""Builds and runs the C++ tests of the core: plainly in the ordinary run, with sanitizers in the slow one."""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SANITIZERS = {
    "plain": ["-O1"],
    "address": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-g", "-fsanitize=thread"],
}


def room(name: str) -> list[str]:
    """List the sources of one folder of csrc/core, without those built for one instruction set only."""
    found = (ROOT / "csrc/core" / name).glob("*.cpp")
    return sorted(f"{name}/{f.stem}" for f in found if not f.stem.endswith(("_v3", "_v4")))


# What each program needs of csrc/core.
TCP = [*room("base"), *room("tcp")]
GROUP = [*room("base"), *room("engine"), *room("shared_memory")]
NETWORK = [*dict.fromkeys([*TCP, *GROUP]), *room("network"), *room("hierarchical")]
PROGRAMS = {
    "digest_test": [*room("base"), "tcp/socket"],
    "tcp_test": TCP,
    "group_test": GROUP,
    "direct_test": NETWORK,
    "network_test": NETWORK,
}


def compiled(arguments: list[str], target: Path) -> Path:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    flags = [
        "-std=c++20",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-pthread",
        "-I",
        str(ROOT / "csrc"),
        "-I",
        str(HERE),
    ]
    command = [compiler, *flags, *arguments, "-o", str(target)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="session")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Compile a source of csrc/core once for all programs: (sanitizer, name) → object file."""
    directory = tmp_path_factory.mktemp("objects")

    @functools.cache
    def compile_one(sanitizer: str, name: str) -> Path:
        source = ROOT / "csrc/core" / f"{name}.cpp"
        return compiled(
            [*SANITIZERS[sanitizer], "-c", str(source)], directory / f"{sanitizer}-{name.replace('/', '-')}.o"
        )

    return compile_one


@pytest.mark.timeout(900)  # the first program of a sanitizer builds what the others use
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    "sanitizer",
    [
        pytest.param("plain", marks=pytest.mark.xdist_group("processes")),
        *(
            pytest.param(s, marks=[pytest.mark.slow, pytest.mark.xdist_group(f"sanitizer {s}")])
            for s in ("address", "thread")
        ),
    ],
)
def test_program(program: str, sanitizer: str, objects: Callable[[str, str], Path], tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(lambda name: str(objects(sanitizer, name)), PROGRAMS[program]))
    main = [*SANITIZERS[sanitizer], str(HERE / f"{program}.cpp"), *parts]
    runnable = compiled(main, tmp_path / program)
    done = subprocess.run([str(runnable)], check=False, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
