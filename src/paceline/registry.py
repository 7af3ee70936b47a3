"""Plug-ins by discovery: a plug-in's name is its file's name, and adding one is adding a file.

Every module of a plug-in package is a plug-in; what plug-ins share lives in sub-packages.
`discover(package)` imports them all. `find_class(module, base)` gives the one concrete subclass that such
a file defines. Others come from outside: from a folder on the package's `__path__`, from a user's file
(`add`; see `plugins`), and from installed distributions, whose entry points in the group of the package's
name say which module a name stands for.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import os
import pkgutil
from collections.abc import Iterable
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

from paceline.errors import ConfigError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

T = TypeVar("T")
OPEN = ("paceline.strategies", "paceline.strategies.staleness", "paceline.codecs", "paceline.collectives")
"""Packages that take plug-ins from users' files and entry points."""
_GROUPS = {
    "paceline.strategies.staleness": "paceline.staleness",
    "paceline.collectives": "paceline.algorithms",
}
_added: dict[str, dict[str, ModuleType]] = {}


def names(package: str) -> list[str]:
    """Names of the plug-ins in `package`, sorted, without importing them."""
    return sorted({*_own_names(package), *_added.get(package, ()), *_entry_points(package)})


def is_own(package: str, name: str) -> bool:
    """Whether plug-in `name` is a file of `package` or of its `__path__`, rather than one that was added."""
    return name in _own_names(package)


def load(package: str, name: str, *, kind: str) -> ModuleType:
    """Import plug-in `name` of `package`; `kind` ("strategy", "codec", …) words the error."""
    known = names(package)
    if name not in known:
        raise ConfigError(unknown(kind, name, known))
    return _import(package, name)


def discover(package: str) -> dict[str, ModuleType]:
    """Import every plug-in of `package`: name → module."""
    return {n: _import(package, n) for n in names(package)}


def add(package: str, name: str, module: ModuleType) -> None:
    """Make `module` the plug-in `name` of `package`; `check_free` says before whether it may be."""
    _added.setdefault(package, {})[name] = module


def check_free(package: str, name: str, aliases: Iterable[str], *, source: str) -> None:
    """ConfigError if `package` knows `name` or one of `aliases` already; `source` is who wants it."""
    taken = set(names(package))
    if package == "paceline.collectives":  # whose plug-ins have other names too
        taken |= {a for module in discover(package).values() for a in getattr(module, "ALIASES", ())}
    for wanted in (name, *aliases):
        if wanted in taken:
            raise ConfigError(
                f"plug-in {source}: {wanted!r} exists already in {package}; rename the file (or its alias)"
            )


def _import(package: str, name: str) -> ModuleType:
    """A file of the package itself first, so that nothing from outside can replace it."""
    if name in _own_names(package):
        return importlib.import_module(f"{package}.{name}")
    if (module := _added.get(package, {}).get(name)) is not None:
        return module
    entry = _entry_points(package)[name]
    try:
        found = entry.load()
    except Exception as error:  # whatever the other distribution raises
        raise ConfigError(
            f"entry point {name} = {entry.value!r} of group {entry.group}: {type(error).__name__}: {error};"
            " reinstall or remove the distribution that declares it"
        ) from error
    if not isinstance(found, ModuleType):
        raise ConfigError(
            f"entry point {name} = {entry.value!r} of group {entry.group}: a module expected, got {found!r}"
        )
    return found


def _own_names(package: str) -> list[str]:
    folders = importlib.import_module(package).__path__
    # Simulations ask for every collective; a folder whose time has not changed has the same files.
    times = tuple(os.stat(folder).st_mtime_ns for folder in folders if os.path.isdir(folder))
    return _names_in(tuple(folders), times)


@functools.lru_cache(maxsize=256)
def _names_in(folders: tuple[str, ...], _times: tuple[int, ...]) -> list[str]:
    return [m.name for m in pkgutil.iter_modules(folders) if not m.ispkg]


@functools.cache
def _entry_points(package: str) -> dict[str, EntryPoint]:
    if package not in OPEN:
        return {}
    import importlib.metadata  # 15 ms that no command pays without need

    return {e.name: e for e in importlib.metadata.entry_points(group=_GROUPS.get(package, package))}


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
