"""Functions of torch.distributed that ask for the backend's name: they refuse every name but gloo's.

They are wrapped when the first group of this backend is made. Groups of other backends see no difference.
"""

from __future__ import annotations

import functools
import importlib
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from paceline.comm.process_group.identity import GroupIdentity


def _group(group: Any) -> Any:
    return group if group is not None else dist.group.WORLD


def apply() -> None:
    """Make monitored_barrier and _set_pg_timeout serve groups of this backend; idempotent."""
    distributed_c10d: Any = importlib.import_module("torch.distributed.distributed_c10d")
    theirs: Any = distributed_c10d.monitored_barrier
    if getattr(theirs, "_serves_paceline", False):
        return

    @functools.wraps(theirs)
    def monitored_barrier(
        group: Any = None, timeout: timedelta | float | None = None, wait_all_ranks: bool = False
    ) -> Any:
        chosen = _group(group)
        if not isinstance(chosen, GroupIdentity):
            return theirs(group, timeout, wait_all_ranks)
        limit = timedelta(seconds=timeout) if isinstance(timeout, (int, float)) else timeout
        return chosen.monitored_barrier(limit, wait_all_ranks=wait_all_ranks)

    set_timeout = distributed_c10d._set_pg_timeout

    @functools.wraps(set_timeout)
    def _set_pg_timeout(timeout: timedelta, group: Any = None) -> Any:
        chosen = _group(group)
        if isinstance(chosen, GroupIdentity):
            return chosen.set_timeout(timeout)
        return set_timeout(timeout, group)

    monitored_barrier._serves_paceline = True  # type: ignore[attr-defined]
    modules: tuple[Any, ...] = (distributed_c10d, dist)
    for module in modules:
        module.monitored_barrier = monitored_barrier
    distributed_c10d._set_pg_timeout = _set_pg_timeout
