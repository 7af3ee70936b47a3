"""Where scripts import `DistributedOptimizer` from."""

from paceline.compat.horovod.optimizer import DistributedOptimizer  # noqa: F401
