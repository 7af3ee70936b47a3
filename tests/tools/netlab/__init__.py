"""Several hosts on one machine, for tests: see `Lab`."""

from netlab.lab import Lab, why_not

__all__ = ["Lab", "why_not"]
