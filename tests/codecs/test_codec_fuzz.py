"""Every C++ decoder under AddressSanitizer and UBSan, with more than a million damaged payloads."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ITERATIONS = 1_200_000


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_decoders_under_address_sanitizer(tmp_path: Path) -> None:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler on the PATH")
    program = tmp_path / "codec_fuzz"
    sources = [ROOT / "csrc/fuzz/codec_fuzz.cpp", ROOT / "csrc/core/base/crc32c.cpp"]
    sources += sorted((ROOT / "csrc/core/codecs").glob("*.cpp"))
    flags = ["-std=c++20", "-O1", "-g", "-ffp-contract=off", "-fsanitize=address,undefined"]
    flags += ["-fno-sanitize-recover=all", f"-I{ROOT / 'csrc'}"]
    subprocess.run([compiler, *flags, *map(str, sources), "-o", str(program)], check=True, timeout=600)
    run = subprocess.run(
        [str(program), str(ITERATIONS)], capture_output=True, text=True, timeout=900, check=False
    )
    assert run.returncode == 0, run.stderr[-4000:]
    rejected, decoded = map(int, re.findall(r"(\d+) rejected, (\d+) decoded", run.stdout)[0])
    assert rejected + decoded == ITERATIONS
    assert rejected > ITERATIONS // 4
    assert decoded > ITERATIONS // 20
