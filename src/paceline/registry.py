"""Plug-ins by discovery: a plug-in's name is its file's name, and adding one is adding a file.

Every module of a plug-in package is a plug-in; what plug-ins share lives in sub-packages.
`discover(package)` imports them all. `find_class(module, base)` gives the one concrete subclass that such
a file defines. A third party adds a plug-in by extending the package's `__path__` with a folder.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Iterable
from types import ModuleType
from typing import TypeVar

from paceline.errors import ConfigError

T = TypeVar("T")


def names(package: str) -> list[str]:
    """Names of the plug-ins in `package`, sorted, without importing them."""
    root = importlib.import_module(package)
    return sorted(m.name for m in pkgutil.iter_modules(root.__path__) if not m.ispkg)


def load(package: str, name: str, *, kind: str) -> ModuleType:
    """Import plug-in `name` of `package`; `kind` ("strategy", "codec", …) words the error."""
    known = names(package)
    if name not in known:
        raise ConfigError(unknown(kind, name, known))
    return importlib.import_module(f"{package}.{name}")


def discover(package: str) -> dict[str, ModuleType]:
    """Import every plug-in of `package`: name → module."""
    return {n: importlib.import_module(f"{package}.{n}") for n in names(package)}


def find_class(module: ModuleType, base: type[T]) -> type[T]:
    """Return the one concrete subclass of `base` that `module` itself defines."""
    found = [
        c
        for _, c in inspect.getmembers(module, inspect.isclass)
        if issubclass(c, base) and c.__module__ == module.__name__ and not inspect.isabstract(c)
    ]
    if len(found) != 1:
        got = ", ".join(c.__name__ for c in found) or "none"
        raise ConfigError(f"plug-in {module.__name__} must define one concrete {base.__name__}; found {got}")
    return found[0]


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """One sentence for a name that does not exist, with the nearest one that does."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r}.{hint} Known: {', '.join(known)}"
