"""Stands where Horovod would: put on the path by `paceline run --as-horovod` only."""

from paceline import __version__  # noqa: F401
