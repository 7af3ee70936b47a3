# mypy: disable-error-code="no-untyped-call,no-any-return"
"""A future whose value C++ sees as a list of tensors.

Python can only make futures of Python objects. TorchScript's fork makes typed ones, and an interpreter that
waits for an incomplete future is suspended: no thread waits. TorchScript reads annotations at run time, so
this file does not postpone them.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch


def _when(done: torch.futures.Future[int], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    torch.jit._wait(done)  # noqa: SLF001  torch has no public name for it
    return tensors


@functools.cache
def _fork() -> Callable[..., Any]:
    when = torch.jit.script(_when)

    def start(
        done: torch.futures.Future[int], tensors: list[torch.Tensor]
    ) -> torch.futures.Future[list[torch.Tensor]]:
        return torch.jit._fork(when, done, tensors)  # noqa: SLF001  as above

    compiled: Callable[..., Any] = torch.jit.script(start)
    return compiled


def typed_future(done: torch.futures.Future, tensors: list[torch.Tensor]) -> Any:
    """Future of `tensors` that completes, or fails, when `done` does."""
    return _fork()(done, tensors)
