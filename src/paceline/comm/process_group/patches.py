"""Two functions of torch.distributed that refuse every backend except gloo: they learn to serve this one.

They are wrapped when the first group of this backend is made. For groups of other backends nothing changes.
"""

from __future__ import annotations

import functools
import importlib
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from paceline.comm.process_group.identity import GroupIdentity

_is_applied = False


def _chosen(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    return group if group is not None else dist.group.WORLD


def apply() -> None:
    """Make monitored_barrier and _set_pg_timeout serve groups of this backend; idempotent."""
    global _is_applied  # noqa: PLW0603  torch is patched once per process
    if _is_applied:
        return
    _is_applied = True
    # A module of torch whose functions are replaced: its type does not allow that.
    distributed_c10d: Any = importlib.import_module("torch.distributed.distributed_c10d")
    original_barrier = distributed_c10d.monitored_barrier
    original_set_timeout = distributed_c10d._set_pg_timeout  # noqa: SLF001  torch has no public name for it

    @functools.wraps(original_barrier)
    def monitored_barrier(
        group: dist.ProcessGroup | None = None,
        timeout: timedelta | float | None = None,
        wait_all_ranks: bool = False,
    ) -> object:
        chosen = _chosen(group)
        if not isinstance(chosen, GroupIdentity):
            return original_barrier(group, timeout, wait_all_ranks)
        limit = timedelta(seconds=timeout) if isinstance(timeout, (int, float)) else timeout
        chosen.monitored_barrier(limit, wait_all_ranks=wait_all_ranks)
        return None

    @functools.wraps(original_set_timeout)
    def set_pg_timeout(timeout: timedelta, group: dist.ProcessGroup | None = None) -> object:
        chosen = _chosen(group)
        if isinstance(chosen, GroupIdentity):
            chosen.set_timeout(timeout)
            return None
        return original_set_timeout(timeout, group)

    dist.monitored_barrier = distributed_c10d.monitored_barrier = monitored_barrier
    distributed_c10d._set_pg_timeout = set_pg_timeout  # noqa: SLF001  as above
