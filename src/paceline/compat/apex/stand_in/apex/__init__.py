"""Stands where Apex would: put on the path by `paceline run --as-apex` only."""

from paceline.compat.apex import amp, parallel

__all__ = ["amp", "parallel"]
