"""`import horovod.torch as hvd` means `paceline.compat.horovod`."""

from paceline.compat.horovod import *  # noqa: F403
