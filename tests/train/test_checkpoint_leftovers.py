"""What a killed save left is removed by the next save, or by `paceline doctor --clean`."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

import paceline
from paceline.cli.main import make_app
from paceline.errors import CheckpointError
from paceline.train.saving import checkpoint

LEFT = (".1.rank0.pt.tmp", ".7.rank3.pt.tmp", ".manifest.json.tmp", "7.rank0.pt", "1.rank5.pt")
OTHERS = ("notes.txt", "best.pt", ".hidden.tmp", "a.rank0.pt")


def leave(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for name in (*LEFT, *OTHERS):
        (folder / name).write_bytes(b"x")


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_the_next_save_removes_it(tmp_path: Path) -> None:
    leave(tmp_path)
    job = paceline.init()
    checkpoint.write(tmp_path, {"a": 1}, job.comm)
    assert names(tmp_path) == sorted(["1.rank0.pt", "manifest.json", *OTHERS])
    checkpoint.write(tmp_path, {"a": 2}, job.comm)
    assert names(tmp_path) == sorted(["2.rank0.pt", "manifest.json", *OTHERS])
    assert checkpoint.read(tmp_path, job.comm)[0] == {"a": 2}
    job.close()


def test_doctor_removes_it(tmp_path: Path) -> None:
    job = paceline.init()
    checkpoint.write(tmp_path, {"a": 1}, job.comm)
    leave(tmp_path)
    done = CliRunner().invoke(make_app(), ["doctor", "--clean", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "removed 7.rank0.pt" in done.output
    assert "5 files removed" in done.output
    assert names(tmp_path) == sorted(["1.rank0.pt", "manifest.json", *OTHERS])
    assert checkpoint.read(tmp_path, job.comm)[0] == {"a": 1}
    job.close()


def test_without_a_manifest_only_temporary_files_go(tmp_path: Path) -> None:
    leave(tmp_path)
    assert checkpoint.clean(tmp_path) == sorted(LEFT[:3])
    with pytest.raises(CheckpointError, match="a folder expected"):
        checkpoint.clean(tmp_path / "none")
