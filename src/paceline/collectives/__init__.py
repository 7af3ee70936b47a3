"""Collective algorithms, one file each; a file's name is the algorithm's name.

A file exports (adding one is all it takes; a folder on `paceline.collectives.__path__` works too):

    build(operation, num_ranks, *, root=0, channels=1, instances=1, …) -> Program
    supports(operation, num_ranks, …) -> True, or a false `No` that says why
    cost(operation, num_ranks, *, root=0, channels=1, instances=1, …) -> Cost, the claim that tests count
    OPERATIONS    the operations it is meant for
    ALIASES       other names of the same algorithm (optional)
    VARIANTS      sets of its own options that tests and `verify_all` try (optional; default: no options)

`channels` × `instances` copies of the program work side by side on parts of each chunk, on channels of their
own. Algorithms that know hosts also take `hosts`, a host's name or number for every rank.
`collectives.sweep.verify_all` proves all of them.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import Any

from paceline import registry, spec
from paceline.errors import ConfigError
from paceline.schedule.cost import Cost, No
from paceline.schedule.program import Program


def names() -> list[str]:
    """Names of all algorithms, without importing them."""
    return registry.names(__name__)


def algorithms() -> dict[str, ModuleType]:
    """Every algorithm by its own name."""
    return registry.discover(__name__)


def aliases() -> dict[str, str]:
    """Other names: alias → name."""
    return {a: name for name, module in algorithms().items() for a in getattr(module, "ALIASES", ())}


def find(name: str) -> ModuleType:
    """Return the algorithm called `name`, which may be an alias; ConfigError names the nearest."""
    known = _known(tuple(__path__))
    if name not in known:  # perhaps a file that was added since
        _known.cache_clear()
        known = _known(tuple(__path__))
    if name not in known:
        raise ConfigError(registry.unknown("algorithm", name, known))
    return importlib.import_module(f"{__name__}.{known[name]}")


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """Split `ring_chunked(segments=4)` into its name and its options: the one way to write an algorithm.

    The name is not looked up and the options are not checked: `supports`, `build` and `cost` do that.
    ConfigError points at the character where the text is not a name with options.
    """
    wanted = spec.parse(text)
    return wanted.name, dict(wanted.arguments)


@lru_cache(maxsize=8)
def _known(path: tuple[str, ...]) -> dict[str, str]:
    """Name or alias → name, of the plug-ins in the folders `path`."""
    return {n: n for n in names()} | aliases()


def supports(name: str, operation: str, num_ranks: int, **options: Any) -> bool | No:
    """True, or a false value that says why algorithm `name` cannot do it."""
    if num_ranks < 1:
        return No(f"at least one rank expected, got {num_ranks}")
    module = find(name)
    own = {k: v for k, v in options.items() if k not in ("channels", "instances")}
    _check_options(name, module.supports, own)
    answer: bool | No = module.supports(operation, num_ranks, **own)
    return answer


def build(name: str, operation: str, num_ranks: int, *, root: int = 0, **options: Any) -> Program:
    """Program of algorithm `name`; ConfigError if it does not support this.

    `options`: `channels`, `instances`, and the algorithm's own (`segments`, `base`, `hosts` …).
    """
    module = find(name)
    _check_options(name, module.build, options)
    if min(options.get("channels", 1), options.get("instances", 1)) < 1:
        raise ConfigError(f"{name}: at least one channel and one instance expected, got {options}")
    answer = supports(name, operation, num_ranks, **options)
    if not answer:
        raise ConfigError(f"{name} cannot do {operation} on {num_ranks} ranks: {answer}")
    if not 0 <= root < num_ranks:
        raise ConfigError(f"{name} {operation}: root {root} is not one of the ranks 0 … {num_ranks - 1}")
    program: Program = module.build(operation, num_ranks, root=root, **options)
    return program


def cost(name: str, operation: str, num_ranks: int, *, root: int = 0, **options: Any) -> Cost:
    """Claimed cost of algorithm `name`."""
    module = find(name)
    _check_options(name, module.cost, options)
    claim: Cost = module.cost(operation, num_ranks, root=root, **options)
    return claim


def _check_options(name: str, function: Callable[..., Any], options: dict[str, Any]) -> None:
    """Refuse options that the algorithm does not have; ConfigError says which it has."""
    if options:
        taken = [p.name for p in inspect.signature(function).parameters.values() if p.default is not p.empty]
        for option in options:
            if option not in taken:
                raise ConfigError(registry.unknown(f"option of {name}", option, taken))
