"""Horovod's timeline: what is on the disk can be read, and a disk without room ends the recording only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from paceline.compat.horovod.request import Request
from paceline.compat.horovod.timeline import Timeline

REQUEST = Request("allreduce.x", "allreduce", shapes=[[2]], dtypes=["float32"])
SCRIPT = Path(__file__).parent / "scripts" / "timeline.py"


def record(timeline: Timeline) -> None:
    timeline.asked(0, REQUEST)
    timeline.asked(1, REQUEST)
    timeline.agreed(REQUEST)
    timeline.begun([REQUEST])
    timeline.done([REQUEST])


def test_every_flush_leaves_a_file_that_can_be_read(tmp_path: Path) -> None:
    clock = iter(range(100))
    timeline, file = Timeline(lambda: float(next(clock))), tmp_path / "trace.json"
    timeline.start(file)
    lengths = []
    for _ in range(3):
        record(timeline)
        timeline.flush()
        lengths.append(len(json.loads(file.read_text())))
    assert lengths == [10, 16, 22]
    times = [row["ts"] for row in json.loads(file.read_text()) if "ts" in row]
    assert times == sorted(times)
    assert times[1] - times[0] == 1_000_000
    timeline.stop()


def test_nothing_is_kept_while_nothing_is_recorded(tmp_path: Path) -> None:
    timeline = Timeline(lambda: 0.0)
    record(timeline)
    timeline.flush()
    timeline.start(tmp_path / "trace.json")
    timeline.stop()
    record(timeline)
    assert len(json.loads((tmp_path / "trace.json").read_text())) == 2


def test_spans_that_are_open_when_the_file_changes_end_in_the_old_one(tmp_path: Path) -> None:
    timeline, other = Timeline(lambda: 0.0), Request("allreduce.y", "allreduce")
    timeline.start(tmp_path / "first.json")
    timeline.asked(0, other)
    timeline.begun([REQUEST])
    timeline.start(tmp_path / "second.json")
    timeline.agreed(other)
    timeline.done([REQUEST])
    record(timeline)
    timeline.stop()
    for name, expected in (("first", "BXBEE"), ("second", "BXXEBE")):
        rows = json.loads((tmp_path / f"{name}.json").read_text())
        assert "".join(r["ph"] for r in rows if r["ph"] != "M") == expected


@pytest.mark.parametrize("path", ["/dev/full", "/nowhere/trace.json"])
def test_a_file_that_cannot_be_written_is_one_line(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    timeline = Timeline(lambda: 0.0)
    timeline.start(path)
    record(timeline)
    timeline.flush()
    timeline.stop()
    assert capsys.readouterr().err.count(f"the timeline {path} cannot be written") == 1


def test_what_was_written_before_the_disk_was_full_can_be_read(tmp_path: Path) -> None:
    code = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_timeline import Timeline, record
timeline = Timeline(lambda: 0.0)
timeline.start({str(tmp_path / "trace.json")!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
for _ in range(20):
    record(timeline)
    timeline.flush()
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stderr.count("cannot be written") == 1
    assert 10 <= len(json.loads((tmp_path / "trace.json").read_text())) < 50


@pytest.mark.distributed
@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("full", [False, True])
def test_ranks_record_on_rank_0(tmp_path: Path, full: bool) -> None:
    command = [sys.executable, "-m", "paceline.cli.main", "run", "--as-horovod", "-np", "2", str(SCRIPT)]
    path = "/dev/full" if full else str(tmp_path / "first.json")
    result = subprocess.run(
        [*command, str(tmp_path), *(["full"] if full else [])],
        env={**os.environ, "HOROVOD_TIMELINE": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-5000:]
    assert result.stdout.count("all good") == 2
    assert ("the timeline /dev/full cannot be written" in result.stdout + result.stderr) == full
