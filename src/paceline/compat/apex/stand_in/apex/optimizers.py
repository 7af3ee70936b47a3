"""`from apex.optimizers import FusedAdam` means `paceline.compat.apex.optimizers`."""

from paceline.compat.apex.optimizers import *  # noqa: F403
