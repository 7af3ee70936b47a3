"""Find a task by name or file, and build it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paceline import registry
from paceline.errors import ConfigError
from paceline.plugins import execute, own_traceback
from paceline.tasks.names import BUILTIN, check_data, check_name
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
        raise ConfigError(f"task {name}: build() raised\n{own_traceback(error)}") from error
    if not isinstance(task, Task):
        raise ConfigError(
            f"task {name}: build() must return a paceline.Task(model, optimizer, train_set, test_set, loss, "
            f"metrics), got {type(task).__name__}"
        )
    return task


def _find(name: str) -> Callable[..., Any]:
    check_name(name)
    if not name.endswith(".py"):
        build: Callable[..., Any] = registry.load(BUILTIN, name, kind="task").build
        return build
    found = getattr(execute(name, Path(name).resolve(), _MODULE, what="task file"), "build", None)
    if not callable(found):
        raise ConfigError(
            f"task file {name} defines no function build(); write "
            "`def build(): return paceline.Task(model, optimizer, train_set, test_set, loss, metrics)`"
        )
    return found  # type: ignore[no-any-return]


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
    check_data(name, data)
    return (data,)
