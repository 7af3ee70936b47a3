"""Where an elastic job keeps its last commit while its workers are restarted.

One file per job, in a folder that only its user can enter; no other job, also one of the same user and name,
reads it.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from paceline.errors import CheckpointError
from paceline.options import JobOptions


class CommitFile:
    """The commit of the job that this process belongs to.

    Args:
        options: What the launcher told this worker.
    """

    def __init__(self, options: JobOptions) -> None:
        self._job = options.job_id or _parent()
        given = os.environ.get("HOROVOD_ELASTIC_COMMIT")
        private = Path(tempfile.gettempdir()) / f"paceline-elastic-{os.getuid()}"
        self._folder = None if given else private
        self._path = Path(given) if given else private / f"{self._job}.commit"

    def write(self, saved: dict[str, Any]) -> None:
        """Replace the commit; what was there before stays whole until the new one is on the disk."""
        if self._folder is not None:
            _make_private(self._folder)
        beside = self._path.with_name(f"{self._path.name}.{self._job}.writing")
        beside.unlink(missing_ok=True)
        with open(os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
            torch.save({"job": self._job, "saved": saved}, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self._path)

    def read(self) -> dict[str, Any] | None:
        """Return what this job committed before its workers were restarted; None at its start."""
        if self._folder is not None and self._folder.exists():
            _make_private(self._folder)
        try:
            is_own = self._path.lstat().st_uid == os.getuid()
        except FileNotFoundError:
            return None
        content = torch.load(self._path, weights_only=True) if is_own else {}
        found: dict[str, Any] | None = content.get("saved") if content.get("job") == self._job else None
        return found

    def remove(self) -> None:
        """Forget the commit: the job has ended."""
        self._path.unlink(missing_ok=True)


def _make_private(folder: Path) -> None:
    """Make the folder, or check that it is this user's own: anyone can make folders beside it."""
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if folder.is_symlink() or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise CheckpointError(
            f"elastic commits: {folder} must be a folder of this user (uid {os.getuid()}) with mode 700, got "
            f"uid {found.st_uid}, mode {found.st_mode & 0o7777:o}; remove it, or name a file in "
            "HOROVOD_ELASTIC_COMMIT"
        )


def _parent() -> str:
    """The launcher, for one that gives no job a name: it outlives its workers, and no other has its start."""
    parent = os.getppid()
    started = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    return f"{os.environ.get('TORCHELASTIC_RUN_ID', 'job')}-{parent}-{started}".replace(os.sep, "_")
