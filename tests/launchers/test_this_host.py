"""What this host lacks is refused before a worker starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from paceline.errors import ConfigError
from paceline.launchers import runner as runners
from paceline.launchers.job import JobSpec
from paceline.options import JobOptions


def check(start: Path, **options: str) -> None:
    job = JobSpec(command=("true",), num_workers=1, working_directory=start, options=JobOptions(**options))
    runners.make("local").check(job)
    assert not list(start.iterdir()), "a check leaves nothing behind"


@pytest.mark.parametrize("names", ["", "lo", "127.0.0.1", "lo, 127.0.0.1", "=lo", "l"])
def test_interfaces_and_addresses_of_this_host(names: str, tmp_path: Path) -> None:
    check(tmp_path, interface=names)


@pytest.mark.parametrize("names", ["eth99", "lo,eth99", "198.51.100.7", ",", "lo\0", "::2", "=l", "=", "lo,"])
def test_others_are_refused_with_what_there_is(names: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--interface .*; its interfaces: .*\blo\b"):
        check(tmp_path, interface=names)


@pytest.mark.parametrize("option", ["checkpoint", "log_dir"])
@pytest.mark.parametrize("path", ["runs/a/b", "."])
def test_folders_that_can_be_made(option: str, path: str, tmp_path: Path) -> None:
    check(tmp_path, **{option: path})


@pytest.mark.parametrize("option", ["checkpoint", "log_dir"])
@pytest.mark.parametrize("path", ["", "/proc/a/b", "/dev/null", f"{__file__}/a", "a\0b", "a" * 300])
def test_folders_that_cannot(option: str, path: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"--{option.replace('_', '-')} .* cannot be written: "):
        check(tmp_path, **{option: path})


def test_a_job_has_a_name() -> None:
    with pytest.raises(ConfigError, match=r"--name"):
        JobSpec(command=("true",), num_workers=1, name=" ")
