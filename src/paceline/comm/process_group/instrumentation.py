"""What surrounds every collective of the backend: profiles, tensors on other devices, and Dynamo."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec

import torch
import torch.distributed as dist

from paceline.comm.process_group import hooks
from paceline.comm.process_group.arguments import Elsewhere
from paceline.comm.process_group.names import BACKEND
from paceline.torch_versions import HAS_PYTHON_BACKENDS

Parameters = ParamSpec("Parameters")

_profiler_enabled = torch._C._autograd._profiler_enabled  # noqa: SLF001  torch has no public name for it
_RecordFunction = torch._C._profiler._RecordFunctionFast  # noqa: SLF001  as above

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
    """Make the methods of `cls` appear in profiles, as "paceline:all_reduce" and the like.

    The methods are also redirected to another backend of the group for tensors on its device, and go by way
    of torch's dispatcher while the group has hooks.
    """
    for name, title in RECORDED.items():
        method = cls.__dict__[name]
        wrapped = _recorded(method, f"{BACKEND}:{title}")
        if HAS_PYTHON_BACKENDS:
            wrapped = hooks.first(wrapped)
        for alias in [a for a, m in cls.__dict__.items() if m is method]:
            setattr(cls, alias, wrapped)


def _recorded(method: Callable[Parameters, dist.Work], title: str) -> Callable[Parameters, dist.Work]:
    name = method.__name__

    @functools.wraps(method)
    def call(*args: Parameters.args, **named: Parameters.kwargs) -> dist.Work:
        if not _profiler_enabled():
            try:
                return method(*args, **named)
            except Elsewhere as error:
                group, *others = args
                other = group.other_backends.get(error.device.type)  # type: ignore[attr-defined]
                if other is None:
                    raise
                return getattr(other, name)(*others, **named)  # type: ignore[no-any-return]
        with _RecordFunction(title, list(tensors_in(args[1:]))):
            work = method(*args, **named)
            if not all(getattr(argument, "asyncOp", True) for argument in args):
                work.wait()  # a synchronous call: the record lasts as long as the operation
            return work

    return call


def tensors_in(values: Iterable[object]) -> Iterable[torch.Tensor]:
    """Yield the tensors of nested lists."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


def hide_from_dynamo(*modules: types.ModuleType) -> None:
    """Keep Dynamo from tracing our functions when C++ calls them inside a compiled region: that crashes."""
    dynamo: Any = torch._C._dynamo.eval_frame  # noqa: SLF001  torch has no public name for it, nor stubs
    skip = dynamo._FrameExecStrategy(dynamo._FrameAction.SKIP, dynamo._FrameAction.SKIP)  # noqa: SLF001  as above
    for module in modules:
        for value in vars(module).values():
            members = vars(value).values() if inspect.isclass(value) else (value,)
            for member in members:
                function = getattr(member, "fget", member)
                while isinstance(function, types.FunctionType):
                    if function.__module__.startswith("paceline."):
                        dynamo.set_code_exec_strategy(function.__code__, skip)
                    function = getattr(function, "__wrapped__", None)
