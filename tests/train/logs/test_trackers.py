"""`job.track`: rank 0 hands every row to the user's trackers, whatever they do."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

import paceline
from paceline.comm.simulated.simulate import simulate
from paceline.errors import ConfigError
from paceline.train.logs.logbook import Logbook, TrainingCounts


class Kept:
    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self.finished = 0

    def log(self, row: dict[str, Any], step: int) -> None:
        self.rows.append((step, dict(row)))
        row.clear()  # it is the tracker's own

    def finish(self) -> None:
        self.finished += 1


class Broken(Kept):
    def log(self, row: dict[str, Any], step: int) -> None:
        super().log(row, step)
        raise RuntimeError("no network")

    def finish(self) -> None:
        super().finish()
        raise RuntimeError("no network")


def logbook(folder: Path, rank: int = 0) -> Logbook:
    return Logbook(rank, 1, folder=folder, formats="jsonl")


def test_every_row_goes_to_every_tracker_and_to_the_files(tmp_path: Path) -> None:
    book, first, second = logbook(tmp_path), Kept(), Kept()
    for tracker in (first, second, first):
        book.trackers.add(tracker)
    book.record(TrainingCounts(step=3), {"loss": 1.5})
    book.record(TrainingCounts(step=4), {"loss": 0.5})
    book.close({"steps": 0})
    book.close({"steps": 0})
    for tracker in (first, second):
        assert [(step, row["step"], row["loss"]) for step, row in tracker.rows] == [(3, 3, 1.5), (4, 4, 0.5)]
        assert tracker.finished == 1
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2


def test_a_tracker_that_raises_is_one_warning(tmp_path: Path) -> None:
    book, broken, kept = logbook(tmp_path), Broken(), Kept()
    book.trackers.add(broken)
    book.trackers.add(kept)
    with pytest.warns(UserWarning, match=r"log of the tracker Broken failed: RuntimeError: no netw") as said:
        for step in range(3):
            book.record(TrainingCounts(step=step), {"loss": 1.0})
        book.close({"steps": 0})
    assert len(said) == 1 and len(broken.rows) == len(kept.rows) == 3
    assert broken.finished == kept.finished == 1


def test_only_rank_0_calls_trackers(tmp_path: Path) -> None:
    def body() -> Any:
        job = paceline.init(log_dir=tmp_path)
        kept = Kept()
        job.track(kept)
        job.log(loss=2.0, note="x")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            job.close()
        return [row["note"] for _, row in kept.rows], kept.finished

    assert list(simulate(body, num_workers=3)) == [(["x"], 1), ([], 0), ([], 0)]


def test_what_is_no_tracker_is_refused_on_all_ranks() -> None:
    class Half:
        def log(self, row: Any, step: int) -> None: ...

    def body() -> str:
        half: Any = Half()
        with pytest.raises(ConfigError) as raised:
            paceline.init().track(half)
        return str(raised.value)

    for text in simulate(body, num_workers=2):
        assert text.startswith("job.track(Half): an object with log(row, step) and finish()")
        assert "it has no finish" in text
