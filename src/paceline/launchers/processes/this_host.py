"""What a job needs of the host that its workers run on: interfaces, folders, and a way to the other hosts."""

from __future__ import annotations

import tempfile
from pathlib import Path

from paceline.comm.rendezvous.interfaces import chosen
from paceline.errors import ConfigError
from paceline.launchers.endpoint import parse_endpoint, resolve
from paceline.launchers.job import JobSpec
from paceline.user_input import shortened


def check(job: JobSpec) -> None:
    """Refuse what the workers of `job` would stumble over after they have started.

    Raises:
        ConfigError: An interface is not there, a folder of the job cannot be written, or the host of the
            rendezvous has no address.
    """
    if job.rendezvous is not None:
        resolve(parse_endpoint(job.rendezvous)[0])
    check_interfaces(job.options.interface)
    start = job.working_directory or Path()
    for option, path in (("--checkpoint", job.options.checkpoint), ("--log-dir", job.options.log_dir)):
        if path is not None:
            check_writable_folder(start, path, option=option)


def check_interfaces(wanted: str) -> None:
    """ConfigError for a list, such as `eth0,10.0.0.1` or `^docker`, that this host has nothing for."""
    try:
        if wanted:
            chosen(wanted)
    except ValueError as error:
        raise ConfigError(f"--interface {shortened(wanted)}: {error}") from error


def check_writable_folder(start: Path, path: str, *, option: str) -> None:
    """ConfigError if `path` is not a folder in which files can be made, nor can become one.

    Args:
        start: The folder that a relative path begins in.
        path: The folder. It is not made.
        option: What names it in errors.
    """
    folder = start.resolve()
    try:
        if not path.strip() or "\0" in path:
            raise ValueError("the name is empty, or has a NUL")
        folder /= path
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder")
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, ValueError) as error:
        why = f"{folder}: {error.strerror}" if isinstance(error, OSError) else error
        raise ConfigError(
            f"{option} {shortened(path)} cannot be written: {why}; name a folder where you may write"
        ) from None
