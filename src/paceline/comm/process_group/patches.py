"""Functions of torch.distributed that refuse all backends but gloo, or keep half of a work, serve this one.

They are wrapped when the first group of this backend is made. For groups of other backends nothing changes.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from paceline.comm.process_group.identity import GroupIdentity
from paceline.comm.process_group.work import for_cpp
from paceline.torch_versions import HAS_PYTHON_BACKENDS, cpp

_is_applied = False


def _chosen(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    return group if group is not None else dist.group.WORLD


def apply() -> None:
    """Make these functions of torch serve groups of this backend; idempotent."""
    global _is_applied  # noqa: PLW0603  torch is patched once per process
    if _is_applied:
        return
    _is_applied = True
    _keep_works_whole()
    if HAS_PYTHON_BACKENDS:
        _notice_hooks()
    else:
        _serve_names()


def _serve_names() -> None:
    """Two functions that torch before 2.14 keeps for gloo."""
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


def _notice_hooks() -> None:
    """Torch's own hooks are added in C++, past the methods of a group: let their `attach` say so."""
    for kind in (cpp.FlightRecorderHook, cpp.NanCheckHook):
        kind.attach = staticmethod(_noticed(kind.attach))


def _noticed(attach: Callable[[dist.ProcessGroup], Any]) -> Callable[[dist.ProcessGroup], Any]:
    @functools.wraps(attach)
    def noticed(group: dist.ProcessGroup) -> Any:
        if isinstance(group, GroupIdentity):
            group.is_hooked = True
        return attach(group)

    return noticed


def _keep_works_whole() -> None:
    """Python hands works to C++ in two places, where only their C++ half would outlive the call."""
    reducer: Any = cpp.Reducer
    set_handle = reducer._set_forward_pass_work_handle  # noqa: SLF001  DDP calls it under `join`
    register_work = cpp._register_work  # noqa: SLF001  wait_tensor() waits for it

    @functools.wraps(set_handle)
    def set_forward_pass_work_handle(self: Any, work: dist.Work, *arguments: Any, **keywords: Any) -> object:
        return set_handle(self, for_cpp(work), *arguments, **keywords)

    @functools.wraps(register_work)
    def register(tensor: torch.Tensor, work: dist.Work) -> object:
        return register_work(tensor, for_cpp(work))

    reducer._set_forward_pass_work_handle = set_forward_pass_work_handle  # noqa: SLF001  as above
    cpp._register_work = register  # noqa: SLF001  as above
