"""Builds and runs the C++ tests of the core: plainly in the ordinary run, with sanitizers in the slow one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SANITIZERS = {
    "plain": ["-O1"],
    "address": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-g", "-fsanitize=thread"],
}
# What each program needs of csrc/core.
TCP = ["sha256", "socket", "handshake", "link", "tcp", "tcp_links", "tcp_messages", "crc32c"]
GROUP = [
    "arena",
    "peer",
    "session",
    "group",
    "pipes",
    "engine",
    "engine_sleep",
    "combine",
    "exchange",
    "reduce",
    "reduce_generic",
]
DIRECT = [*TCP, *GROUP, "direct", "direct_combine", "direct_exchange"]
PROGRAMS = {
    "digest_test": ["sha256", "socket"],
    "tcp_test": TCP,
    "group_test": GROUP,
    "direct_test": DIRECT,
}


def build(program: str, sanitizer: str, directory: Path) -> Path:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    target = directory / program
    sources = [HERE / f"{program}.cpp", *(ROOT / "csrc/core" / f"{name}.cpp" for name in PROGRAMS[program])]
    flags = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-pthread", *SANITIZERS[sanitizer]]
    includes = ["-I", str(ROOT / "csrc"), "-I", str(HERE)]
    command = [compiler, *flags, *includes, "-o", str(target), *map(str, sources)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return target


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    "sanitizer",
    [
        pytest.param("plain", marks=pytest.mark.xdist_group("processes")),
        *(pytest.param(s, marks=pytest.mark.slow) for s in ("address", "thread")),
    ],
)
def test_program(program: str, sanitizer: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [str(build(program, sanitizer, tmp_path))], check=False, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
