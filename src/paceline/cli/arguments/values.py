"""What the texts given on a command line mean, checked before anything starts."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from paceline import declarations, registry
from paceline.errors import ConfigError
from paceline.launchers.job import Resources
from paceline.user_input import shortened

_FABRICS = ("native", "torch")
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_LOCAL_RANK_OPTIONS = ("--local_rank", "--local-rank")


def check_script(script: str, *, module: bool, folder: Path) -> None:
    """ConfigError if there is no file, or with `module` no module, named `script` in `folder`."""
    folder = folder.resolve()
    if module:
        sys.path.insert(0, str(folder))
        try:
            found = importlib.util.find_spec(script)
        except (ImportError, ValueError):
            found = None
        finally:
            sys.path.remove(str(folder))
        if found is None:
            raise ConfigError(f"no module named {shortened(script)} in {folder} or on the Python path")
    elif not os.path.isfile(folder / script):  # False also for what cannot be a file's name
        what = "is a folder" if os.path.isdir(folder / script) else "does not exist"
        raise ConfigError(f"script {shortened(script)} {what} (looked in {folder}); for a module use -m")


def check_training(strategy: str | None, fabric: str | None) -> None:
    """ConfigError for a strategy, an argument of it, or a fabric that does not exist; without torch."""
    if fabric is not None and fabric not in _FABRICS:
        raise ConfigError(f"--fabric {fabric!r}: {' or '.join(_FABRICS)} expected")
    if strategy is not None:
        declarations.check("paceline.strategies", strategy)


def check_strategy_values(strategy: str | None) -> None:
    """ConfigError for values that the strategy refuses, such as period=0; its constructor needs torch."""
    if strategy is not None:
        from paceline.strategies.base.strategy import make

        make(strategy)


def check_log_formats(formats: str | None) -> None:
    """ConfigError for a name in --log-to that is not a log format."""
    known = registry.names("paceline.train.logs.formats")
    for name in formats.split(",") if formats is not None else ():
        if name not in known:
            raise ConfigError(registry.unknown("log format", name, known))


def parse_pairs(option: str, texts: Sequence[str] | None) -> dict[str, str]:
    """["a=1", "b=2"] gives {"a": "1", "b": "2"}."""
    pairs = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ConfigError(f"{option} {text!r}: NAME=VALUE expected")
        pairs[name] = value
    return pairs


def parse_environment(texts: Sequence[str] | None) -> dict[str, str]:
    """As `parse_pairs`; a NAME without a value takes it from this process."""
    for text in texts or ():
        if any("\ud800" <= c <= "\udfff" or c == "\0" for c in text):
            raise ConfigError(f"--env {text!r}: text without NUL and in UTF-8 expected")
        if "=" not in text and text not in os.environ:
            raise ConfigError(f"--env {text}: {text} is not set here; give {text}=VALUE")
    return parse_pairs("--env", [t if "=" in t else f"{t}={os.environ[t]}" for t in texts or ()])


def parse_resources(text: str | None) -> Resources | None:
    """The value of --resources, for example "cpus=2,gpus=1,memory=4g"; None if it is not given."""
    if text is None:
        return None
    known: Mapping[str, str] = {"cpus": "cpus", "gpus": "gpus", "memory": "memory_bytes"}
    values: dict[str, float] = {}
    for name, value in parse_pairs("--resources", text.split(",")).items():
        if name not in known:
            raise ConfigError("--resources: " + registry.unknown("resource", name, known))
        unit = r"\s*([kmgt]?)(?:i?b)?" if name == "memory" else "()"  # gpus and cpus have no unit
        match = re.fullmatch(rf"([0-9]+(?:\.[0-9]*)?|\.[0-9]+){unit}", value.strip().lower())
        if match is None:
            what = "a size such as 512m or 4g" if name == "memory" else "a number"
            raise ConfigError(f"--resources {name}={value}: {what} expected")
        number = float(match[1]) * _UNITS[match[2]]
        if number > 1e18:
            raise ConfigError(f"--resources {name}: at most 1e18 expected, got {shortened(value)}")
        values[known[name]] = number
    memory = values.pop("memory_bytes", None)
    return Resources(**values, memory_bytes=None if memory is None else int(memory))


def local_rank_option(script: Path, arguments: list[str]) -> str | None:
    """The option with which an older script takes its local rank: the one that its parser declares."""
    try:
        tree = ast.parse(script.read_text())
    except (SyntaxError, ValueError, RecursionError, MemoryError, OSError):
        return None  # the worker will report what is wrong with the script
    declared = {
        argument.value
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "add_argument"
        for argument in call.args
        if isinstance(argument, ast.Constant)
    }
    wanted = [option for option in _LOCAL_RANK_OPTIONS if option in declared]
    given = any(argument.startswith(_LOCAL_RANK_OPTIONS) for argument in arguments)
    return wanted[0] if wanted and not given else None


def stand_ins(*, horovod: bool, apex: bool) -> dict[str, str]:
    """A PYTHONPATH for workers that begins with our stand-ins for `import horovod` and `import apex`."""
    compat = Path(__file__).resolve().parents[2] / "compat"
    wanted = [str(compat / n / "stand_in") for n, yes in (("horovod", horovod), ("apex", apex)) if yes]
    if not wanted:
        return {}
    given = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([*wanted, *([given] if given else [])])}
