"""`from apex.parallel import DistributedDataParallel` means `paceline.compat.apex.parallel`."""

from paceline.compat.apex.parallel import *  # noqa: F403
