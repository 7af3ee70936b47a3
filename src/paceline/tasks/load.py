"""Find a task by name or file, and build it."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from paceline import registry
from paceline.errors import ConfigError
from paceline.tasks.task import Task

_MODULE = "paceline_user_task"


def load(name: str, *, data: Path | None = None) -> Task:
    """Build the built-in task `name`, or the one that the Python file `name` defines by `build()`.

    `data` goes to a `build` that takes it. Raises ConfigError, with the file's own traceback if it raised.
    """
    build = _find(name)
    arguments = _arguments(name, build, data)
    try:
        task = build(*arguments)
    except ConfigError as error:
        raise ConfigError(f"task {name}: {error}") from error
    except Exception as error:
        raise ConfigError(f"task {name}: build() raised\n{_own_traceback(error)}") from error
    if not isinstance(task, Task):
        raise ConfigError(
            f"task {name}: build() must return a paceline.Task(model, optimizer, train_set, test_set, loss, "
            f"metrics), got {type(task).__name__}"
        )
    return task


def _find(name: str) -> Callable[..., Any]:
    if not name.endswith(".py"):
        known = registry.names("paceline.tasks.builtin")
        if name not in known:
            unknown = registry.unknown("task", name, known)
            raise ConfigError(f"{unknown}; or the path of a file.py that defines build() -> paceline.Task")
        build: Callable[..., Any] = registry.load("paceline.tasks.builtin", name, kind="task").build
        return build
    path = Path(name).resolve()
    if not path.is_file():
        raise ConfigError(f"task file {name} does not exist (looked in {Path.cwd()})")
    found = getattr(_execute(name, path), "build", None)
    if not callable(found):
        raise ConfigError(
            f"task file {name} defines no function build(); write "
            "`def build(): return paceline.Task(model, optimizer, train_set, test_set, loss, metrics)`"
        )
    return found  # type: ignore[no-any-return]


def _execute(name: str, path: Path) -> ModuleType:
    specification = importlib.util.spec_from_file_location(_MODULE, path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[_MODULE] = module  # classes that the file defines must be found by pickle and dataclasses
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    try:
        specification.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"task file {name} raised while it was read\n{_own_traceback(error)}") from error
    return module


def _arguments(name: str, build: Callable[..., Any], data: Path | None) -> tuple[Path, ...]:
    takes = [p for p in inspect.signature(build).parameters.values() if p.kind != p.VAR_KEYWORD]
    if not takes:
        if data is not None:
            raise ConfigError(f"task {name} takes no data, got --data {data}")
        return ()
    if len([p for p in takes if p.default is p.empty]) > 1:
        raise ConfigError(f"task {name}: build() may take one argument, the path of the data")
    if data is None:
        if takes[0].default is not takes[0].empty:
            return ()
        raise ConfigError(f"task {name} needs its data: give --data PATH")
    if not data.exists():
        raise ConfigError(f"task {name}: --data {data} does not exist (looked in {Path.cwd()})")
    return (data,)


def _own_traceback(error: Exception) -> str:
    """The traceback without the frames of this file and of the import machinery."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f.filename != __file__ and not f.filename.startswith("<frozen")]
    return "".join([*traceback.format_list(own), *traceback.format_exception_only(error)]).rstrip()
