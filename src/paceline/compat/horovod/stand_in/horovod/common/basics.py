"""Where libraries import the object of ranks and sizes from."""

from paceline.compat.horovod.common.basics import HorovodBasics  # noqa: F401
