"""`from apex.parallel import DistributedDataParallel` means `paceline.compat.apex.parallel`."""

import importlib

# First: imported later, the module of that name would hide the class.
importlib.import_module("apex.parallel.LARC")

from paceline.compat.apex.parallel import *  # noqa: E402, F403
