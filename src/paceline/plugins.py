"""Strategies, codecs, collective algorithms and staleness policies from a user's file.

A file's name is the plug-in's name, as inside the package; a file may define one plug-in of each kind, and a
folder stands for all files in it. `load` runs a file and puts what it defines where `registry` finds it, so
that specs, listings and errors treat it like any other. Jobs take the files along: see `JobOptions.plugins`.

    paceline schedule verify ./zigzag.py
    paceline run --plugin my_method.py --strategy 'my_method(period=4)' train.py

Installed distributions use entry points instead; see `registry`.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
import traceback
from pathlib import Path
from types import ModuleType

from paceline import registry
from paceline.errors import ConfigError

_PACKAGE = "paceline_plugins"
_CLASSES = {
    "paceline.strategies": ("paceline.strategies.base.strategy:TrainingStrategy",),
    "paceline.strategies.staleness": ("paceline.strategies.base.staleness_policy:StalenessPolicy",),
    "paceline.codecs": (
        "paceline.codecs.kernel.codec:Codec",
        "paceline.codecs.reducers.reducer:Reducer",
    ),
}
_ALGORITHM = ("build", "supports", "cost", "OPERATIONS")
_EXPECTED = (
    "a subclass of TrainingStrategy, Codec, Reducer or StalenessPolicy, or the functions build, supports and"
    " cost with OPERATIONS of an algorithm"
)
_loaded: dict[Path, str] = {}


def files() -> tuple[str, ...]:
    """Absolute paths of the files that were loaded, in that order."""
    return tuple(str(path) for path in _loaded)


def load(path: str, *, moved: bool = False) -> list[str]:
    """Load the plug-ins of a file, or of every file of a folder; one that is loaded already is not run again.

    Args:
        path: The file or folder.
        moved: Where there is no such file, take the one of that name in the current folder: a job's files
            may be elsewhere on the worker's host.

    Returns:
        The plug-ins' names.

    Raises:
        ConfigError: There is no such file, it raises, it defines no plug-in, or the name is taken.
    """
    try:
        given = Path(path).resolve()
        if moved and not given.exists():
            given = Path(given.name).resolve()
        found = sorted(given.glob("*.py")) if given.is_dir() else [given]
        exists = all(one.is_file() for one in found)
    except (OSError, ValueError, RuntimeError):  # no name of a file, or a circle of links
        found, exists = [], False
    if not found or not exists:
        raise ConfigError(f"plug-in {path!r}: no such file, nor a folder with .py files (in {Path.cwd()})")
    return [_load_file(one) for one in found if one.stem != "__init__"]


def named(text: str) -> str:
    """`./zigzag.py(segments=4)` becomes `zigzag(segments=4)` after loading the file; other names stay."""
    match = re.fullmatch(r"\s*([^()]+\.py)\s*(\(.*\))?\s*", text, re.DOTALL)
    return text if match is None else load(match[1])[0] + (match[2] or "")


def _load_file(path: Path) -> str:
    name = path.stem
    if path in _loaded:
        return name
    if path.suffix != ".py" or not name.isidentifier():
        raise ConfigError(f"plug-in {path}: a file NAME.py expected, with a name of letters, digits and _")
    module = execute(str(path), path, f"{_PACKAGE}.{name}", what="plug-in")
    homes = _homes(module)
    if not homes:
        raise ConfigError(f"plug-in {path} defines none of the kinds: {_EXPECTED}; CONTRIBUTING.md says how")
    for home in homes:
        registry.check_free(home, name, getattr(module, "ALIASES", ()), source=str(path))
    for home in homes:
        registry.add(home, name, module)
    _loaded[path] = name
    return name


def _homes(module: ModuleType) -> list[str]:
    """The plug-in packages of what `module` defines."""
    own = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
    homes = ["paceline.collectives"] if all(hasattr(module, name) for name in _ALGORITHM) else []
    for home, bases in _CLASSES.items():
        for place in bases:
            base_module, _, base_name = place.partition(":")
            # What a file subclasses it has imported; importing it here would load torch for algorithms.
            base = getattr(sys.modules.get(base_module), base_name, None)
            concrete = [c for c in own if base and issubclass(c, base) and not inspect.isabstract(c)]
            if len(concrete) > 1:
                names = ", ".join(c.__name__ for c in concrete)
                raise ConfigError(f"plug-in {module.__file__}: one {base_name} a file expected, got {names}")
            homes += [home] if concrete else []
    return homes


def execute(shown: str, path: Path, module_name: str, *, what: str) -> ModuleType:
    """Run a user's file as a module. Its folder is importable then.

    Args:
        shown: The file as the user wrote it, for errors.
        path: The file.
        module_name: The module's name: classes of the file must be found by pickle and dataclasses.
        what: The kind of file, for errors: "task file".

    Raises:
        ConfigError: The file raised, or is not Python; with its own traceback.
    """
    specification = importlib.util.spec_from_file_location(module_name, path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[module_name] = module
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    try:
        specification.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        raise ConfigError(f"{what} {shown} raised while it was read\n{own_traceback(error)}") from error
    return module


def own_traceback(error: Exception) -> str:
    """The traceback of a user's code, without the frames of Paceline's loaders and the import machinery."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith("<frozen") and not _is_loader(f.filename)]
    return "".join([*traceback.format_list(own), *traceback.format_exception_only(error)]).rstrip()


def _is_loader(file: str) -> bool:
    return file == __file__ or file.endswith("paceline/tasks/load.py")
