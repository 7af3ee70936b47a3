"""A folder that no other account of this host can enter: for sockets and keys."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from paceline.errors import ConfigError


def private_folder() -> Path:
    """The folder of this account for sockets and keys, made if it is not there.

    It is in the directory for temporary files, because paths of Unix sockets are at most 107 bytes long.

    Raises:
        ConfigError: Another account has made it, or others may enter it.
    """
    folder = Path(tempfile.gettempdir()) / f"paceline-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise ConfigError(
            f"{folder}: this account's folder for sockets cannot be made: {error}; set TMPDIR to a folder"
            " that you can write"
        ) from None
    if status.st_uid != os.getuid() or not stat.S_ISDIR(status.st_mode) or status.st_mode & 0o077:
        raise ConfigError(
            f"{folder} must be a directory of this account with mode 700; remove it, or set TMPDIR to another"
            " folder"
        )
    return folder
