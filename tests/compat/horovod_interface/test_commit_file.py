"""An elastic job's commit is for its own restarted workers: for no other job and no other user."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from paceline.compat.horovod.commit_file import CommitFile
from paceline.errors import CheckpointError
from paceline.options import JobOptions


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("HOROVOD_ELASTIC_COMMIT", raising=False)
    return tmp_path


def test_jobs_do_not_see_each_other(temporary: Path) -> None:
    first, second = CommitFile(JobOptions(job_id="a")), CommitFile(JobOptions(job_id="b"))
    first.write({"step": 4})
    assert second.read() is None
    second.write({"step": 7})
    assert CommitFile(JobOptions(job_id="a")).read() == {"step": 4}
    (folder,) = temporary.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert all(f.stat().st_mode & 0o777 == 0o600 for f in folder.iterdir())
    first.remove()
    assert first.read() is None
    assert second.read() == {"step": 7}


def test_a_new_job_does_not_continue_from_a_file_that_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOROVOD_ELASTIC_COMMIT", str(tmp_path / "commit"))
    CommitFile(JobOptions(job_id="a")).write({"step": 4})
    assert CommitFile(JobOptions(job_id="b")).read() is None
    assert CommitFile(JobOptions(job_id="a")).read() == {"step": 4}


def test_without_a_name_the_launcher_names_the_job() -> None:
    CommitFile(JobOptions()).write({"step": 1})
    assert CommitFile(JobOptions()).read() == {"step": 1}


@pytest.mark.parametrize("is_link", [False, True])
def test_a_folder_that_others_can_enter_is_refused(temporary: Path, is_link: bool) -> None:
    CommitFile(JobOptions(job_id="a")).write({})
    (folder,) = temporary.iterdir()
    if is_link:
        folder.rename(temporary / "elsewhere")
        folder.symlink_to(temporary / "elsewhere")
    else:
        folder.chmod(0o755)
    for call in (
        lambda: CommitFile(JobOptions(job_id="a")).write({}),
        CommitFile(JobOptions(job_id="a")).read,
    ):
        with pytest.raises(CheckpointError, match="mode 700"):
            call()
