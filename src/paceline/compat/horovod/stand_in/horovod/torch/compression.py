"""Where scripts import `Compression` from."""

from paceline.compat.horovod.compression import *  # noqa: F403
