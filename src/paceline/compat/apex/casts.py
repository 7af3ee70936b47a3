"""Functions of a user's whose arguments `amp` casts under opt_level O1: by decorator, or by name.

As in Apex, arguments are cast and the body runs as it would otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from paceline.errors import ConfigError

Function = Callable[..., Any]


class Casts:
    """Whether arguments are cast, and to what; `amp.initialize` sets it."""

    def __init__(self) -> None:
        self.is_on = False
        self.is_paused = False
        self.low_precision = torch.bfloat16
        self.registered: list[tuple[Any, str, Function]] = []

    @property
    def is_active(self) -> bool:
        """Whether a call casts now."""
        return self.is_on and not self.is_paused

    def start(self, low_precision: torch.dtype) -> None:
        """Cast from now on, also in the functions that were registered."""
        self.is_on, self.low_precision = True, low_precision
        registered, self.registered = self.registered, []
        for module, name, decorate in registered:
            setattr(module, name, decorate(getattr(module, name)))


casts = Casts()


def half_function(fn: Function) -> Function:
    """Decorate a function: its floating-point tensors arrive in low precision."""
    return _decorated(fn, lambda args, kwargs: _cast((args, kwargs), casts.low_precision))


def float_function(fn: Function) -> Function:
    """Decorate a function: its floating-point tensors arrive in float32."""
    return _decorated(fn, lambda args, kwargs: _cast((args, kwargs), torch.float32))


def promote_function(fn: Function) -> Function:
    """Decorate a function: tensors of low precision arrive in float32 if another one is float32.

    Other mixtures of dtypes raise ConfigError when it is called.
    """

    def promoted(args: Any, kwargs: Any) -> Any:
        dtypes = set(_dtypes((args, kwargs)))
        if len(dtypes) <= 1:
            return args, kwargs
        if dtypes != {torch.float32, casts.low_precision}:
            raise ConfigError(
                f"amp.promote_function({_name(fn)}): tensors of {casts.low_precision} and torch.float32 "
                f"expected, got {', '.join(sorted(map(str, dtypes)))}; cast them yourself"
            )
        return _cast((args, kwargs), torch.float32)

    return _decorated(fn, promoted)


def register_half_function(module: Any, name: str) -> None:
    """Make `module.name` a `half_function` at the next `amp.initialize`; ConfigError if it is missing."""
    _register(module, name, half_function)


def register_float_function(module: Any, name: str) -> None:
    """Make `module.name` a `float_function` at the next `amp.initialize`; ConfigError if it is missing."""
    _register(module, name, float_function)


def register_promote_function(module: Any, name: str) -> None:
    """Make `module.name` a `promote_function` at the next `amp.initialize`; ConfigError if it is missing."""
    _register(module, name, promote_function)


@contextmanager
def disable_casts() -> Iterator[None]:
    """Cast nothing inside, under opt_level O1: neither arguments of functions nor in a model's forward."""
    if not casts.is_active:
        yield
        return
    casts.is_paused = True
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        casts.is_paused = False


def _decorated(fn: Function, change: Callable[[Any, Any], Any]) -> Function:
    @functools.wraps(fn)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if casts.is_active:
            args, kwargs = change(args, kwargs)
        return fn(*args, **kwargs)

    return wrapper


def _register(module: Any, name: str, decorate: Function) -> None:
    if not hasattr(module, name):
        raise ConfigError(f"amp.register_{decorate.__name__}: {module!r} has no function {name!r}")
    casts.registered.append((module, name, decorate))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _cast(item, dtype) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_cast(item, dtype) for item in value)
    return value


def _dtypes(value: Any) -> Iterator[torch.dtype]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value.dtype
    elif isinstance(value, dict):
        yield from _dtypes(list(value.values()))
    elif type(value) in (list, tuple):
        for item in value:
            yield from _dtypes(item)


def _name(fn: Function) -> str:
    return getattr(fn, "__qualname__", repr(fn))
