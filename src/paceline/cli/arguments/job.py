"""Options that describe a job, for every verb that takes one, and the JobSpec they make."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paceline import registry
from paceline.errors import ConfigError
from paceline.spec import parse

if TYPE_CHECKING:
    from paceline.launchers.job import Resources

LAUNCH = "Launch"
ENGINE = "Engine"
TRAIN = "Training"
COMPATIBILITY = "Scripts of other projects"

_FABRICS = ("native", "torch")
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}

Script = Annotated[str, typer.Argument(help="A Python file, or a module's name with -m.", metavar="SCRIPT")]
Arguments = Annotated[
    list[str] | None, typer.Argument(help="Given to the script as they are.", metavar="[ARGS]...")
]
Workers = Annotated[
    int,
    typer.Option(
        "-n",
        "-np",
        "--workers",
        help="Worker processes: on each of --nodes hosts; without --nodes, in all.",
        rich_help_panel=LAUNCH,
    ),
]
Module = Annotated[
    bool, typer.Option("-m", "--module", help="SCRIPT is a module's name.", rich_help_panel=LAUNCH)
]
Nodes = Annotated[int, typer.Option(help="Hosts in this job.", rich_help_panel=LAUNCH)]
Threads = Annotated[
    int | None,
    typer.Option(
        help="Threads per worker (OMP_NUM_THREADS). Default: cores of this host / workers, at least 1.",
        show_default=False,
        rich_help_panel=LAUNCH,
    ),
]
MaxRestarts = Annotated[
    int | None,
    typer.Option(
        help="Start all workers again after a failure, so often. Default: the engine's own policy; local: 0.",
        show_default=False,
        rich_help_panel=LAUNCH,
    ),
]
ResourcesText = Annotated[
    str | None,
    typer.Option(
        "--resources",
        metavar="cpus=N,gpus=N,memory=SIZE",
        help="What each worker needs; memory as in 512m or 4g.",
        rich_help_panel=ENGINE,
    ),
]
Environment = Annotated[
    list[str] | None,
    typer.Option(
        "--env",
        metavar="NAME=VALUE",
        help="Set in every worker; NAME alone: as it is here. Repeatable.",
        rich_help_panel=ENGINE,
    ),
]
WorkingDirectory = Annotated[
    Path | None,
    typer.Option(
        "--workdir",
        metavar="FOLDER",
        help="Where workers run, the same path on every host. Default: the current directory.",
        rich_help_panel=ENGINE,
    ),
]
Ship = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Code that the engine sends to its hosts; SCRIPT is looked for in it, workers run in the copy.",
        rich_help_panel=ENGINE,
    ),
]
MinWorkers = Annotated[
    int | None,
    typer.Option(
        help="Go on with so few when workers are lost for good. On local: for strategies that survive it"
        " (parameter_server, gossip, decentralized_threshold); rank 0 is needed.",
        rich_help_panel=ENGINE,
        show_default=False,
    ),
]
MaxWorkers = Annotated[
    int | None,
    typer.Option(help="Take up to so many when there is room.", rich_help_panel=ENGINE, show_default=False),
]
Name = Annotated[str, typer.Option(help="The job's name in the engine's lists.", rich_help_panel=ENGINE)]
EngineOptions = Annotated[
    list[str] | None,
    typer.Option(
        "-o",
        "--engine-option",
        metavar="NAME=VALUE",
        help="For one engine only, such as address=HOST:PORT (ray) or master=URL (spark). Repeatable.",
        rich_help_panel=ENGINE,
    ),
]


def check(script: str, *, module: bool, folder: Path, strategy: str | None, fabric: str | None) -> None:
    """Find what is wrong before anything starts."""
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
            raise ConfigError(f"no module named {script!r} in {folder} or on the Python path")
    elif not (folder / script).is_file():
        what = "is a folder" if (folder / script).is_dir() else "does not exist"
        raise ConfigError(f"script {script!r} {what} (looked in {folder}); for a module use -m")
    check_training(strategy, fabric)


def check_training(strategy: str | None, fabric: str | None) -> None:
    """ConfigError for a strategy or fabric that does not exist."""
    if fabric is not None and fabric not in _FABRICS:
        raise ConfigError(f"--fabric {fabric!r}: {' or '.join(_FABRICS)} expected")
    if strategy is not None:
        parsed = parse(strategy)
        if parsed.name not in (known := registry.names("paceline.strategies")):  # before torch is imported
            raise ConfigError(registry.unknown("strategy", parsed.name, known))
        from paceline.strategies.base.strategy import make

        make(strategy)


def check_log_formats(formats: str | None) -> None:
    """ConfigError for a name in --log-to that is no format."""
    known = registry.names("paceline.train.logs.formats")
    for name in formats.split(",") if formats is not None else ():
        if name not in known:
            raise ConfigError(registry.unknown("log format", name, known))


def parse_pairs(option: str, texts: Sequence[str] | None) -> dict[str, str]:
    """["a=1", "b=2"] → {"a": "1", "b": "2"}."""
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
        if "=" not in text and text not in os.environ:
            raise ConfigError(f"--env {text}: it is not set here; give {text}=VALUE")
    return parse_pairs("--env", [t if "=" in t else f"{t}={os.environ[t]}" for t in texts or ()])


def parse_resources(text: str | None) -> Resources | None:
    """ "cpus=2,gpus=1,memory=4g" as Resources."""
    from paceline.launchers.job import Resources

    if text is None:
        return None
    known: Mapping[str, str] = {"cpus": "cpus", "gpus": "gpus", "memory": "memory_bytes"}
    values: dict[str, float] = {}
    for name, value in parse_pairs("--resources", text.split(",")).items():
        if name not in known:
            raise ConfigError("--resources: " + registry.unknown("resource", name, known))
        unit = r"\s*([kmgt]?)(?:i?b)?" if name == "memory" else "()"
        match = re.fullmatch(rf"(\d+(?:\.\d*)?|\.\d+){unit}", value.strip().lower())
        if match is None:
            what = "a size such as 512m or 4g" if name == "memory" else "a number"
            raise ConfigError(f"--resources {name}={value}: {what} expected")
        values[known[name]] = float(match[1]) * _UNITS[match[2]]
    memory = values.pop("memory_bytes", None)
    return Resources(**values, memory_bytes=None if memory is None else int(memory))


def local_rank_option(script: Path, arguments: list[str]) -> str | None:
    """The option by which an older script wants its local rank: the one that its own parser declares."""
    try:
        tree = ast.parse(script.read_text())
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return None  # the worker will say what is wrong with it
    declared = {
        argument.value
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "add_argument"
        for argument in call.args
        if isinstance(argument, ast.Constant)
    }
    wanted = [o for o in ("--local_rank", "--local-rank") if o in declared]
    given = any(a.startswith(("--local_rank", "--local-rank")) for a in arguments)
    return wanted[0] if wanted and not given else None


def stand_ins(*, horovod: bool, apex: bool) -> dict[str, str]:
    """Put packages that answer to other projects' names first on the workers' Python path."""
    compat = Path(__file__).resolve().parents[2] / "compat"
    wanted = [str(compat / n / "stand_in") for n, yes in (("horovod", horovod), ("apex", apex)) if yes]
    if not wanted:
        return {}
    given = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([*wanted, *([given] if given else [])])}
