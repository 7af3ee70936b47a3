"""What Horovod offers beside its collectives."""

from paceline.compat.horovod.common.util import *  # noqa: F403
from paceline.compat.horovod.queries import ccl_built, ddl_built, gloo_built, mpi_built, nccl_built  # noqa: F401
