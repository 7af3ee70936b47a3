"""Hooks around collectives, as torch 2.14 has them: flight recorder, checks for NaN, the user's own.

torch calls them in its dispatcher, on the way from a group to its backend. The methods of our group do not go
there: that costs a small operation more time than the operation itself, and works that come back have lost
`is_completed`, `result` and `source_rank`. So a group has a backend as well, the same member seen from below
the dispatcher, and its methods take the long way while there are hooks. C++ that dispatches by itself, as
replayed graphs do, finds the backend too.
"""

from __future__ import annotations

import functools
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from paceline.comm.process_group.names import BACKEND
from paceline.torch_versions import HAS_PYTHON_BACKENDS, cpp

Parameters = ParamSpec("Parameters")
Collective = Callable[Concatenate[Any, Parameters], dist.Work]


class Passage(threading.local):
    """How far this thread's call has come."""

    is_below = False
    """Whether hooks have been called, and the backend does the operation."""
    work: dist.Work | None = None
    """Ours, of which torch returns a part."""


_unhooked: dict[str, Callable[..., dist.Work]] = {}
"""By name: the methods of a group without the way round."""


_Backend: Any = cpp.Backend if HAS_PYTHON_BACKENDS else object


class PacelineBackend(_Backend):  # type: ignore[misc]
    """A member of a group as torch's dispatcher sees it. The group owns it, so it knows the group weakly."""

    def __init__(self, group: HookedGroup, rank: int, size: int) -> None:
        _Backend.__init__(self, rank, size)
        self._group = weakref.ref(group)

    def _member(self) -> Any:
        group = self._group()
        if group is None:
            raise RuntimeError("paceline backend: the process group of this backend no longer exists")
        return group

    def getBackendName(self) -> str:
        """Name by which init_process_group knows this backend."""
        return BACKEND

    def start_coalescing(self) -> None:
        """Begin to collect the works of the following calls."""
        self._member()._start_coalescing(torch.device("cpu"))  # noqa: SLF001  torch's name for it

    def end_coalescing(self) -> dist.Work:
        """Return one work for those collected."""
        work: dist.Work = self._member()._end_coalescing(torch.device("cpu"))  # noqa: SLF001  as above
        return work

    def set_timeout(self, timeout: Any) -> None:
        """Set the timeout of operations that name none."""
        self._member().set_timeout(timeout)

    def monitored_barrier(self, opts: Any, wait_all_ranks: bool) -> None:
        """As barrier, but rank 0 names the missing ranks."""
        self._member().monitored_barrier(opts.timeout, wait_all_ranks)

    def _get_sequence_number_for_group(self) -> int:
        number: int = self._member()._get_sequence_number_for_group()  # noqa: SLF001  torch's name for it
        return number

    def _set_sequence_number_for_group(self) -> None:
        pass

    def allreduce_sparse(self, tensors: list[torch.Tensor], opts: Any) -> dist.Work:
        """Sum sparse tensors over all members."""
        return self.allreduce(tensors, opts)  # type: ignore[no-any-return]

    def abort(self) -> None:
        """Fail what is in flight; the group cannot be used any more."""
        if (group := self._group()) is not None:
            group.abort()

    def shutdown(self) -> None:
        """Leave the group; idempotent."""
        if (group := self._group()) is not None:
            group.shutdown()


def _below(name: str) -> Callable[..., dist.Work]:
    def call(self: PacelineBackend, *arguments: Any) -> dist.Work:
        group = self._member()
        passage: Passage = group.passage
        passage.is_below = True
        try:
            work = passage.work = _unhooked[name](group, *arguments)
        finally:
            passage.is_below = False
        return work

    call.__name__ = name
    return call


def first(method: Collective[Parameters]) -> Collective[Parameters]:
    """Make this method of a group call the group's hooks first, if it has any."""
    name = method.__name__
    _unhooked[name] = method
    setattr(PacelineBackend, name, _below(name))
    long_way = _through_dispatcher(name)

    @functools.wraps(method)
    def call(self: Any, *arguments: Parameters.args, **named: Parameters.kwargs) -> dist.Work:
        passage = self.passage
        if not self.is_hooked or passage.is_below:
            return method(self, *arguments, **named)
        returned = long_way(self, *arguments, **named)
        work, passage.work = passage.work, None
        return returned if work is None else work

    return call  # type: ignore[return-value]


def _through_dispatcher(name: str) -> Callable[..., dist.Work]:
    """The method of torch's own ProcessGroup.

    pybind11 calls the C++ method of the base class only if the Python function that calls has the name of the
    override; otherwise it takes the call for one that the override is meant for.
    """
    base = getattr(dist.ProcessGroup, name)

    def through(self: HookedGroup, *arguments: Any, **named: Any) -> dist.Work:
        work: dist.Work = base(self, *arguments, **named)
        return work

    code = through.__code__.replace(co_name=name)
    return types.FunctionType(code, through.__globals__, name, None, through.__closure__)


class HookedGroup(dist.ProcessGroup):
    """A group around whose collectives torch may call hooks."""

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self.is_hooked = False
        """Whether hooks were added, perhaps removed again."""
        self.passage = Passage()
        if not HAS_PYTHON_BACKENDS:
            dist.ProcessGroup.__init__(self, rank, size)  # type: ignore[call-arg]
            return
        dist.ProcessGroup.__init__(self, store, rank, size)
        custom, backend = dist.ProcessGroup.BackendType.CUSTOM, PacelineBackend(self, rank, size)
        self._set_default_backend(custom)
        self._register_backend(torch.device("cpu"), custom, backend)

    def register_pre_hook(self, hook_id: int, hook: Callable[..., None]) -> None:
        """Call `hook` before each collective."""
        self.is_hooked = True
        super().register_pre_hook(hook_id, hook)  # type: ignore[misc]

    def register_post_hook(self, hook_id: int, hook: Callable[..., None]) -> None:
        """Call `hook` after each collective was started."""
        self.is_hooked = True
        super().register_post_hook(hook_id, hook)  # type: ignore[misc]
