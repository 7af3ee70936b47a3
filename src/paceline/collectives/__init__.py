"""Collective algorithms, one file each; a file's name is the algorithm's name.

A file exports (adding one is all it takes; a folder on `paceline.collectives.__path__` works too):

    build(operation, num_ranks, *, root=0, …) -> Program
    supports(operation, num_ranks, …) -> True, or a false `No` that says why
    cost(operation, num_ranks, *, root=0, …) -> Cost, the claim that tests count
    OPERATIONS    the operations it is meant for
    ALIASES       other names of the same algorithm (optional)
    VARIANTS      sets of its own options that tests and `verify_all` try (optional; default: no options)

`…` are the algorithm's own options, which its file explains. One that knows hosts has the option `hosts`.

Every algorithm also has the options `channels` and `instances`: `channels` × `instances` copies of its
program run side by side, each on a part of every chunk and on channels of its own. The functions of this
module apply them, so an algorithm's file need not mention them. One that does (multi_channel_ring has
`channels`) gives that option a meaning of its own.

Wherever a user names an algorithm it is written like `ring_chunked(segments=4)`, which `parse` reads.
`verification.sweep.verify_all` proves all algorithms.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from numbers import Integral
from types import ModuleType
from typing import Any

from paceline import registry, spec
from paceline.errors import ConfigError
from paceline.schedule.cost import Cost, No
from paceline.schedule.program import Program, replicate

COPIES = ("channels", "instances")
"""Options that every algorithm has: how many copies of the program run side by side."""
_MOST = 4096  # of any option: more segments or copies would only cost memory


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
    if name not in known:  # perhaps its file was added since
        _known.cache_clear()
        known = _known(tuple(__path__))
    if name not in known:
        raise ConfigError(registry.unknown("algorithm", name, known))
    return registry.load(__name__, known[name], kind="algorithm")


@lru_cache(maxsize=8)
def _known(path: tuple[str, ...]) -> dict[str, str]:
    """Name or alias → name, of the plug-ins in the folders `path`."""
    return aliases() | {n: n for n in names()}


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """Split `ring_chunked(segments=4)` into its name and its options: the one way to write an algorithm.

    The name is not looked up and the options are not checked: `supports`, `build` and `cost` do that.
    ConfigError points at the character where the text is not a name with options.
    """
    wanted = spec.parse(text)
    return wanted.name, dict(wanted.arguments)


def option_names(name: str) -> list[str]:
    """Names of the options of algorithm `name`: `channels`, `instances`, then its own."""
    own = inspect.signature(find(name).build).parameters
    return [*COPIES, *(p for p in own if p not in ("operation", "num_ranks", "root", *COPIES))]


def with_hosts(name: str, given: Mapping[str, Any], hosts: Sequence[str]) -> dict[str, Any]:
    """Return the options `given`, with `hosts` added if the algorithm knows hosts and the user named none.

    Nothing is added where all ranks share one host, or none do: then the algorithm groups them as it likes.
    """
    is_grouped = 1 < len(set(hosts)) < len(hosts)
    if is_grouped and "hosts" not in given and "hosts" in option_names(name):
        return {**given, "hosts": hosts}
    return dict(given)


def supports(name: str, operation: str, num_ranks: int, **options: object) -> bool | No:
    """True, or a false value that says why algorithm `name` cannot do it with these options.

    Raises ConfigError for an option that the algorithm does not have, or a value of the wrong kind.
    """
    module = find(name)
    check_options(name, options)
    if num_ranks < 1:
        return No(f"at least one rank expected, got {num_ranks}")
    answer: bool | No = module.supports(operation, num_ranks, **_taken(module.supports, options))
    return answer


def build(name: str, operation: str, num_ranks: int, *, root: int = 0, **options: object) -> Program:
    """Build the program of algorithm `name`.

    Args:
        name: An algorithm's name or alias.
        operation: all_reduce, broadcast, …, see `schedule.contract.OPERATIONS`.
        num_ranks: P, at least 1.
        root: Root of broadcast, reduce, gather and scatter, 0 … P−1; others ignore it.
        options: `channels`, `instances`, and the algorithm's own (`segments`, `base`, `hosts` …).

    Raises:
        ConfigError: The algorithm does not support this; the message says why.
    """
    answer = supports(name, operation, num_ranks, **options)
    if not answer:
        raise ConfigError(f"{name} cannot do {operation} on {num_ranks} ranks: {answer}")
    if not 0 <= root < num_ranks:
        raise ConfigError(f"{name} {operation}: root {root} is not one of the ranks 0 … {num_ranks - 1}")
    module = find(name)
    own = _taken(module.build, options)
    program: Program = module.build(operation, num_ranks, root=root, **own)
    return replicate(program, _copies(own, options))


def cost(name: str, operation: str, num_ranks: int, *, root: int = 0, **options: object) -> Cost:
    """Claimed cost of algorithm `name`; arguments as of `build`, which must accept them."""
    module = find(name)
    check_options(name, options)
    own = _taken(module.cost, options)
    claim: Cost = module.cost(operation, num_ranks, root=root, **own)
    return replace(claim, messages=claim.messages * _copies(own, options))


def _taken(function: Callable[..., object], options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `options` that the algorithm's `function` has."""
    parameters = inspect.signature(function).parameters
    return {option: value for option, value in options.items() if option in parameters}


def _copies(own: Mapping[str, Any], options: Mapping[str, Any]) -> int:
    """How many copies of its program to make, for the `options` that are not the algorithm's `own`."""
    return math.prod(options.get(option, 1) for option in COPIES if option not in own)


def check_options(name: str, given: Mapping[str, Any]) -> None:
    """ConfigError for an option that algorithm `name` does not have, and for a value of the wrong kind."""
    if not given:
        return
    known = option_names(name)
    parameters = inspect.signature(find(name).build).parameters
    for option, value in given.items():
        if option not in known:
            raise ConfigError(registry.unknown(f"option of {name}", option, known))
        kind = "int" if option in COPIES else str(parameters[option].annotation)
        is_whole = isinstance(value, Integral) and not isinstance(value, bool)
        if not is_whole and (kind == "int" or (kind == "int | None" and value is not None)):
            raise ConfigError(f"{name}: {option}: a whole number expected, got {value}")
        if is_whole and abs(value) > _MOST:
            raise ConfigError(f"{name}: {option}: at most {_MOST} expected, got {value}")
        if option in COPIES and value < 1:
            raise ConfigError(f"{name}: at least one {option[:-1]} expected, got {value}")
