"""What surrounds every collective of the backend: profiles, other devices, invisibility to Dynamo."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch

from paceline.comm.process_group.arguments import Elsewhere
from paceline.comm.process_group.register import BACKEND

_profiler_enabled = torch._C._autograd._profiler_enabled

# Method of a ProcessGroup -> its name in profiles, which are those of gloo.
RECORDED = {
    "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce",
    "reduce": "reduce",
    "reduce_scatter": "reduce_scatter",
    "reduce_scatter_single": "_reduce_scatter_base",
    "broadcast": "broadcast",
    "gather": "gather",
    "scatter": "scatter",
    "allgather": "all_gather",
    "allgather_coalesced": "all_gather",
    "all_gather_single": "_all_gather_base",
    "alltoall": "all_to_all",
    "all_to_all_single": "all_to_all",
    "send": "send",
    "recv": "recv",
    "recv_anysource": "recvAnySource",
    "barrier": "barrier",
}


def record_calls(cls: type) -> None:
    """Make the methods of `cls` show in profiles as "paceline:all_reduce" and the like."""
    for name, title in RECORDED.items():
        method = cls.__dict__[name]
        wrapped = _recorded(method, f"{BACKEND}:{title}")
        for alias in [a for a, m in cls.__dict__.items() if m is method]:
            setattr(cls, alias, wrapped)


def _recorded(method: Callable[..., Any], title: str) -> Callable[..., Any]:
    name = method.__name__

    @functools.wraps(method)
    def call(self: Any, *args: Any, **named: Any) -> Any:
        if not _profiler_enabled():
            try:
                return method(self, *args, **named)
            except Elsewhere as error:
                other = self.other_backends.get(error.device.type)
                if other is None:
                    raise
                return getattr(other, name)(*args, **named)
        with torch._C._profiler._RecordFunctionFast(title, list(tensors_in(args))):
            work = method(self, *args, **named)
            if not getattr(args[-1], "asyncOp", True):
                work.wait()  # the record lasts as long as the call
            return work

    return call


def tensors_in(values: Iterable[Any]) -> Iterable[torch.Tensor]:
    """Yield the tensors of nested lists."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


def hide_from_dynamo(*modules: types.ModuleType) -> None:
    """Keep Dynamo from tracing our functions when C++ calls them inside a compiled region: that crashes."""
    dynamo: Any = torch._C._dynamo.eval_frame
    skip = dynamo._FrameExecStrategy(dynamo._FrameAction.SKIP, dynamo._FrameAction.SKIP)
    for module in modules:
        for value in vars(module).values():
            members = vars(value).values() if inspect.isclass(value) else (value,)
            for member in members:
                function = getattr(member, "fget", member)
                while isinstance(function, types.FunctionType):
                    if function.__module__.startswith("paceline."):
                        dynamo.set_code_exec_strategy(function.__code__, skip)
                    function = getattr(function, "__wrapped__", None)
