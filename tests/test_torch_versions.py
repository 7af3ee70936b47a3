"""The newest torch is no error: a warning says what was tried."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from paceline import torch_versions


def test_a_torch_newer_than_those_tried_gets_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    torch_versions.warn_if_newer.cache_clear()
    monkeypatch.setattr(torch_versions, "TORCH", (9, 1))
    with pytest.warns(UserWarning, match=r"newer than 2\.14.*pip install 'torch<=2\.14\.99'"):
        torch_versions.warn_if_newer()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch_versions.warn_if_newer()
        torch_versions.warn_if_newer.cache_clear()
        monkeypatch.setattr(torch_versions, "TORCH", torch_versions.NEWEST_TRIED)
        torch_versions.warn_if_newer()


def test_nothing_else_asks_for_the_version() -> None:
    source = Path(torch_versions.__file__).parent
    asking = {
        str(path.relative_to(source))
        for path in source.rglob("*.py")
        if "torch.__version__" in path.read_text()
    }
    shown = {"bench/hardware.py", "doctor/host.py", "train/saving/checkpoint.py"}
    assert asking - shown == {"torch_versions.py"}


@pytest.mark.skipif(torch_versions.HAS_PYTHON_BACKENDS, reason="torch 2.14 sends only torchcomms' own there")
@pytest.mark.skipif(torch_versions.TORCH < (2, 11), reason="torchcomms came with torch 2.11")
def test_torchcomms_is_refused_with_the_line_that_mends_it(tmp_path: Path) -> None:
    package = tmp_path / "torchcomms"
    package.mkdir()
    (package / "__init__.py").write_text("def new_comm(*a, **k): raise KeyError('unknown backend')\n")
    (package / "_comms.py").write_text("class _BackendWrapper: pass\n")
    (package / "hooks.py").write_text("class FlightRecorderHook: pass\n")
    script = """
import paceline
import torch.distributed as dist
from paceline.comm.process_group import register
register.register()
dist.init_process_group("paceline", store=dist.HashStore(), rank=0, world_size=1)
"""
    environment = {"TORCH_DISTRIBUTED_USE_TORCHCOMMS": "1", "PYTHONPATH": f"{tmp_path}", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert "Unset the variable, or use torch 2.14" in done.stderr, done.stderr
