"""A log that cannot be written costs rows, not the training; `close` reaches the communicator in any case."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import paceline
from paceline.train.logs.logbook import FORMATS, Logbook, TrainingCounts


def test_a_full_disk_is_one_warning() -> None:
    """/dev/full is a disk without room: opening works, writing does not."""
    logbook = Logbook(0, 1, folder="/dev", formats=FORMATS)
    logbook._open = lambda name: [JsonLines(Path("/dev/full"))]  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match=r"cannot be written: .*room on the disk") as warned:
        for step in range(3):
            logbook.record(TrainingCounts(step=step), {"loss": 1.0})
        logbook.close({"steps": 0})
    assert len(warned) == 1


class JsonLines:
    """The jsonl format on a device: only regular files have an end to cut."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a")

    def write(self, row: Any) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


@pytest.mark.parametrize("format_name", FORMATS)
def test_rows_are_written_again_when_there_is_room(format_name: str, tmp_path: Path) -> None:
    folder = tmp_path / "a file, not a folder"
    folder.write_text("")
    logbook = Logbook(0, 1, folder=folder, formats=format_name)
    with pytest.warns(UserWarning, match="cannot be written"):
        logbook.record(TrainingCounts(step=1), {"loss": 1.0})
    folder.unlink()
    logbook.record(TrainingCounts(step=2), {"loss": 2.0})
    logbook.close({"steps": 0})
    assert "2.0" in (folder / f"log.{format_name}").read_text()


class Broken:
    def __init__(self, name: str, done: list[str]) -> None:
        self.name, self.done = name, done

    def fail(self, *_: Any, **__: Any) -> None:
        self.done.append(self.name)
        raise OSError(f"{self.name} is broken")

    close = detach = end = fail


def test_close_reaches_the_communicator_whatever_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    job = paceline.init()
    model = torch.nn.Linear(2, 2)
    job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    done: list[str] = []
    monkeypatch.setattr(job, "_progress", Broken("progress", done))
    monkeypatch.setattr(job, "_stop", Broken("stop", done))
    monkeypatch.setattr(job, "logbook", Broken("logbook", done))
    monkeypatch.setattr(job.attachments[0], "detach", Broken("attachment", done).fail)
    with pytest.raises(OSError, match="attachment is broken"):
        job.close()
    assert done == ["progress", "stop", "logbook", "attachment"]
    assert job.comm.unusable == "it was closed"
    monkeypatch.undo()
    job.close()


@pytest.mark.parametrize("before", [b"epoch,\xff,a\n1,2,3\n", b'epoch,"' + b"x" * 200_000 + b'"\n'])
def test_a_table_that_cannot_be_read_does_not_end_training(before: bytes, tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_bytes(before)
    logbook = Logbook(0, 1, folder=tmp_path, formats="csv")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        logbook.record(TrainingCounts(step=2), {"loss": 2.5})
        logbook.close({"steps": 0})
    after = (tmp_path / "log.csv").read_bytes()
    assert before[:7] in after[:10]
    assert b"2.5" in after or "it is no table" in str(warned[0].message)
