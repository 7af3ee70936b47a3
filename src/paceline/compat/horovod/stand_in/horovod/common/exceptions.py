"""Where scripts import Horovod's exceptions from."""

from paceline.compat.horovod.constants import HorovodInternalError, HostsUpdatedInterrupt  # noqa: F401
