"""`paceline bench collectives`: what it accepts, what it writes, what it leaves behind."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from paceline.bench import collectives as bench
from paceline.cli.arguments.schedule import size
from paceline.cli.main import make_app
from paceline.errors import ConfigError, WorkerFailed

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("processes")]

KEYS = {"operation", "num_bytes", "ranks", "library", "fabric", "buffers", "algorithm", "median_s"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("4", 4), ("4B", 4), ("32KiB", 32768), ("1 MB", 10**6), ("0.5MiB", 1 << 19), ("2gi", 2 << 30)],
)
def test_sizes(text: str, expected: int) -> None:
    assert size(text) == expected


@pytest.mark.parametrize("text", ["", "MB", "four", "1TBB"])
def test_wrong_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match="not a number of bytes"):
        size(text)


def test_peers() -> None:
    assert bench.parse_peers("none") == []
    assert [p.library for p in bench.parse_peers("gloo")] == ["gloo"]
    with pytest.raises(ConfigError, match="NAME=PYTHON"):
        bench.parse_peers("nccl")
    with pytest.raises(ConfigError, match="mpi4py"):
        bench.parse_peers("mpich=/nowhere/python")


def test_wrong_names_and_numbers() -> None:
    good = {"operations": ["all_reduce"], "sizes": [4], "ranks": [2], "peers": []}
    for wrong in ({"operations": ["allreduce"]}, {"sizes": [0]}, {"ranks": []}, {"fabrics": ["infiniband"]}):
        with pytest.raises(ConfigError):
            bench.measure(**{**good, **wrong})


@pytest.fixture(autouse=True)
def own_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tells the processes of this test from those of tests that run beside it."""
    monkeypatch.setenv("PACELINE_TEST_MARK", str(os.getpid()))


def children() -> set[int]:
    mark = f"PACELINE_TEST_MARK={os.getpid()}"
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command, environment = (entry / "cmdline").read_text(), (entry / "environ").read_text()
            except OSError:
                continue
            if "collective_worker.py" in command and mark in environment.split("\0"):
                found.add(int(entry.name))
    return found


def test_every_operation_beside_gloo(tmp_path: Path) -> None:
    before = children()
    json_file, html = tmp_path / "rows.json", tmp_path / "rows.html"
    arguments = ["--operations", "all", "--sizes", "4,8KB", "--ranks", "2", "--peers", "gloo"]
    arguments += ["--fabrics", "native,tcp", "--blocks", "1", "--block-seconds", "0.001"]
    done = CliRunner().invoke(
        make_app(), ["bench", "collectives", *arguments, "--json", str(json_file), "--html", str(html)]
    )
    assert done.exit_code == 0, done.output
    rows = json.loads(json_file.read_text())["rows"]
    assert all(set(row) >= KEYS and row["median_s"] > 0 for row in rows)
    assert {r["operation"] for r in rows} == set(bench.OPERATIONS)
    assert {(r["library"], r["fabric"], r["buffers"]) for r in rows if r["operation"] == "all_reduce"} == {
        ("paceline", "native", "private"),
        ("paceline", "native", "allocated"),
        ("paceline", "tcp", "private"),
        ("gloo", "gloo", "private"),
    }
    page = html.read_text()
    assert "physical limit" in page
    assert "<script src=" not in page
    assert "gloo" in done.output
    assert children() <= before


def test_a_library_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench, "_WORKER", tmp_path / "missing.py")
    before = children()
    with pytest.raises(WorkerFailed, match="0 of 2 ranks"):
        bench.measure(
            operations=["barrier"], sizes=[4], ranks=[2], peers=[bench.Peer("gloo", sys.executable)]
        )
    assert children() <= before
