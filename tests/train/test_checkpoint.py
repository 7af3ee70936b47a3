"""Save-and-continue equals save-exit-resume; damage and a full disk are errors that lose nothing."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import data_bodies
import pytest
from rank_pool import RankPool

pytestmark = pytest.mark.xdist_group("processes")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "paceline-test", str(folder)], check=False, timeout=20
    )
    if mounted.returncode:
        pytest.skip("cannot mount a tmpfs here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True, timeout=20)


@pytest.mark.parametrize(
    "strategy", ["all_reduce", "local_sgd(period=3)", "local_sgd(period=4, average_optimizer=true)"]
)
def test_resumed_equals_continued(three: RankPool, tmp_path: Path, strategy: str) -> None:
    folder = str(tmp_path / "checkpoint")
    continued = three.run(data_bodies.trained_with_save, strategy, folder, "continue")
    resumed = three.run(data_bodies.trained_with_save, strategy, folder, "resume")
    assert continued == resumed
    assert len({digest for digest, *_ in continued}) == 1
    assert continued[0][1][0] == (1, 8)  # the next minibatch of the interrupted epoch
    names = sorted(p.name for p in (tmp_path / "checkpoint").iterdir())
    assert names == ["1.rank0.pt", "1.rank1.pt", "1.rank2.pt", "manifest.json"]


def test_full_disk_keeps_the_checkpoint_before(three: RankPool, small_disk: Path) -> None:
    for text, names in three.run(data_bodies.checkpoint_error, str(small_disk), "full"):
        assert "CheckpointError: rank" in text
        assert "kept 1.0" in text
        assert names == ["1.rank0.pt", "1.rank1.pt", "1.rank2.pt", "manifest.json"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", "manifest.json"),
        ("flipped", "is damaged"),
        ("other model", "does not fit this model"),
        ("optimizer", "was saved with the optimizers SGD, this job has AdamW"),
        ("strategy", "was saved with strategy ['all_reduce'], this job uses ['local_sgd']"),
    ],
)
def test_what_cannot_be_loaded_is_a_clear_error(
    three: RankPool, tmp_path: Path, damage: str, message: str
) -> None:
    results = three.run(data_bodies.checkpoint_error, str(tmp_path), damage)
    assert all(text.startswith("CheckpointError") for text, _ in results)
    assert message in results[0][0], results[0][0]


def test_another_number_of_ranks_takes_the_consensus_model(three: RankPool, tmp_path: Path) -> None:
    for ours, theirs, epoch in three.run(data_bodies.other_size, str(tmp_path)):
        assert ours == theirs
        assert epoch == 0
