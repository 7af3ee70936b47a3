"""Names of tasks, checked without torch and without running a task's file."""

from __future__ import annotations

from pathlib import Path

from paceline import registry
from paceline.errors import ConfigError

BUILTIN = "paceline.tasks.builtin"


def check_name(name: str) -> None:
    """ConfigError if `name` is neither a built-in task nor a Python file."""
    if name.endswith(".py"):
        if not Path(name).resolve().is_file():
            raise ConfigError(f"task file {name} does not exist (looked in {Path.cwd()})")
        return
    known = registry.names(BUILTIN)
    if name not in known:
        unknown = registry.unknown("task", name, known)
        raise ConfigError(f"{unknown}; or the path of a file.py that defines build() -> paceline.Task")


def check_data(name: str, data: Path) -> None:
    """ConfigError if the data for task `name` is not there."""
    if not data.exists():
        raise ConfigError(f"task {name}: --data {data} does not exist (looked in {Path.cwd()})")
