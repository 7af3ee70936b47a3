"""Where scripts import single operations from."""

from paceline.compat.horovod import *  # noqa: F403
