"""The variables by which Horovod's launcher tells a worker who it is; scripts read them."""

from __future__ import annotations

import os

from paceline.comm.rendezvous.environment import who_am_i
from paceline.errors import ConfigError


def publish(*, again: bool = False) -> None:
    """Set HOROVOD_RANK, HOROVOD_SIZE, HOROVOD_LOCAL_RANK and their kin.

    Args:
        again: Also those that are set, because they are of the process that started this one; default no.
    """
    try:
        identity = who_am_i(os.environ)
    except ConfigError:
        return  # `hvd.init()` says it
    hosts = max(1, identity.size // max(1, identity.local_size))
    values = {
        "RANK": identity.rank,
        "SIZE": identity.size,
        "LOCAL_RANK": identity.local_rank,
        "LOCAL_SIZE": identity.local_size,
        "CROSS_RANK": int(os.environ.get("GROUP_RANK", "0")),
        "CROSS_SIZE": int(os.environ.get("GROUP_WORLD_SIZE", str(hosts))),
    }
    for name, value in values.items():
        if again or f"HOROVOD_{name}" not in os.environ:
            os.environ[f"HOROVOD_{name}"] = str(value)
