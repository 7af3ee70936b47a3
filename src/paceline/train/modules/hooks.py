"""Hooks: on modules, of a kind that copies and pickles leave behind; and what takes any of them off."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol


class Removable(Protocol):
    """What registering a hook returns."""

    def remove(self) -> None: ...


class ModuleHook:
    """Calls a method while its object lives; copied or pickled, it is a hook that does nothing.

    Args:
        method: A bound method; None for the hook of a copy.
    """

    def __init__(self, method: Callable[..., Any] | None = None) -> None:
        self._method = None if method is None else weakref.WeakMethod(method)

    def __call__(self, *arguments: Any) -> Any:
        method = None if self._method is None else self._method()
        return None if method is None else method(*arguments)

    def __reduce__(self) -> Any:
        return ModuleHook, ()
