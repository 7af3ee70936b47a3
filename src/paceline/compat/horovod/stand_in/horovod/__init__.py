"""Stands where Horovod would: put on the path by `paceline run --as-horovod` only."""

from paceline import __version__  # noqa: F401
from paceline.compat.horovod.common.environment import publish
from paceline.compat.horovod.common.launch import run  # noqa: F401

publish()
