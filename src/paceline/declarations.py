"""What the file of a plug-in declares, read without running it: its arguments, and what it is for.

The files of strategies, codecs and staleness policies import torch, which takes seconds; a misspelt argument
is refused, and a list is printed, without it. The class and its bases are found in the source text. Only the
package's own files are read so: a user's file has been run when its name is known. What a value may be is
decided by the constructor, which needs torch.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from paceline import registry, spec
from paceline.errors import ConfigError
from paceline.spec import Spec

KINDS: Mapping[str, str] = MappingProxyType(
    {
        "paceline.strategies": "strategy",
        "paceline.strategies.staleness": "staleness policy",
        "paceline.codecs": "codec",
    }
)
"""What the plug-ins of each package are called in errors."""
_ROOTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "paceline.strategies": ("TrainingStrategy",),
        "paceline.strategies.staleness": ("StalenessPolicy",),
        "paceline.codecs": ("Codec", "Reducer"),
    }
)
_ALL_ROOTS = {name for names in _ROOTS.values() for name in names}
_NESTED = {"codec": "paceline.codecs", "staleness": "paceline.strategies.staleness"}


@dataclass(frozen=True)
class Declaration:
    """What the class of a plug-in declares."""

    signature: inspect.Signature
    """Of its constructor. Annotations are text."""
    summary: str
    """First line of its docstring."""
    advice: str
    """When to choose it; "" where its kind has no advice."""


def check(package: str, text: str | Spec) -> None:
    """ConfigError for a name or an argument that does not exist; also in the specs that are arguments.

    Args:
        package: A key of `KINDS`.
        text: A spec; for staleness policies, several joined by `+`.

    What is not declared in a file of the package is not checked here.
    """
    if isinstance(text, Spec):
        terms: tuple[Spec, ...] = (text,)
    else:
        terms = spec.parse_sum(text) if package == _NESTED["staleness"] else (spec.parse(text),)
    for term in terms:
        known = registry.names(package)
        if term.name not in known:
            raise ConfigError(registry.unknown(KINDS[package], term.name, known))
        if (declared := read(package, term.name)) is None:
            continue
        spec.check(declared.signature, term, kind=KINDS[package])
        for argument in _NESTED.keys() & term.arguments.keys():
            value = term.arguments[argument]
            for part in value if isinstance(value, tuple) else (value,):
                if isinstance(part, Spec | str):
                    check(_NESTED[argument], part)


def read_all(package: str) -> dict[str, Declaration]:
    """What each plug-in of `package`, a key of `KINDS`, declares; those from elsewhere are imported."""
    return {name: read(package, name) or _imported(package, name) for name in registry.names(package)}


def _imported(package: str, name: str) -> Declaration:
    module = registry.load(package, name, kind=KINDS[package])
    own = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
    for found in own:
        roots = {base.__name__ for base in found.__mro__} & set(_ROOTS[package])
        if roots and not inspect.isabstract(found):
            summary = (inspect.getdoc(found) or "").partition("\n")[0]
            return Declaration(inspect.signature(found), summary, getattr(found, "advice", ""))
    raise ConfigError(f"plug-in {module.__name__} defines no class for {package}")


def read(package: str, name: str) -> Declaration | None:
    """What the file of plug-in `name` of `package` declares.

    Args:
        package: A key of `KINDS`.
        name: The plug-in's name.

    Returns:
        None if it is not a file of the package, or its class cannot be understood without running it.
    """
    found = _module(f"{package}.{name}") if registry.is_own(package, name) else None
    if found is None:
        return None
    chains = [chain for c in found.classes if not c.startswith("_") and (chain := list(_bases(found, c)))]
    chains = [chain for chain in chains if chain[-1].name in _ROOTS[package]]
    if len(chains) != 1:
        return None
    try:
        signature = _signature(chains[0])
    except ValueError:  # a default that is computed
        return None
    summary = (ast.get_docstring(chains[0][0]) or "").partition("\n")[0]
    return Declaration(signature, summary, _text(chains[0], "advice"))


@dataclass(frozen=True)
class _Module:
    """The classes of a file, and where its imported names come from."""

    classes: Mapping[str, ast.ClassDef]
    imports: Mapping[str, tuple[str, str]]


@functools.cache
def _module(name: str) -> _Module | None:
    """The file of a module of this package; None for others."""
    found = importlib.util.find_spec(name) if name.startswith("paceline.") else None
    if found is None or found.origin is None or not found.origin.endswith(".py"):
        return None
    tree = ast.parse(Path(found.origin).read_text(encoding="utf-8"))
    imports = {
        alias.asname or alias.name: (node.module or "", alias.name)
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    return _Module({c.name: c for c in tree.body if isinstance(c, ast.ClassDef)}, imports)


def _bases(module: _Module, name: str) -> Iterator[ast.ClassDef]:
    """The class called `name` in `module`, then its first base in this package, that one's, and so on."""
    if (own := module.classes.get(name)) is None:
        home, original = module.imports.get(name, ("", ""))
        if (other := _module(home)) is not None:
            yield from _bases(other, original)
        return
    yield own
    if own.name not in _ALL_ROOTS:
        for base in own.bases:
            if above := list(_bases(module, ast.unparse(base))):
                yield from above
                return


def _signature(chain: list[ast.ClassDef]) -> inspect.Signature:
    """Of the nearest constructor; ValueError if a default is not written as a plain value."""
    for node in chain:
        for member in node.body:
            if isinstance(member, ast.FunctionDef) and member.name == "__init__":
                return inspect.Signature(list(_parameters(member.args)))
    return inspect.Signature()


def _parameters(given: ast.arguments) -> Iterator[inspect.Parameter]:
    positional = [*given.posonlyargs, *given.args]
    missing: list[ast.expr | None] = [None] * (len(positional) - len(given.defaults))
    pairs = list(zip(positional, [*missing, *given.defaults], strict=True))[1:]  # without self
    for kind, arguments in (
        (inspect.Parameter.POSITIONAL_OR_KEYWORD, pairs),
        (inspect.Parameter.KEYWORD_ONLY, list(zip(given.kwonlyargs, given.kw_defaults, strict=True))),
    ):
        for argument, default in arguments:
            yield inspect.Parameter(
                argument.arg,
                kind,
                default=inspect.Parameter.empty if default is None else ast.literal_eval(default),
                annotation=ast.unparse(argument.annotation) if argument.annotation else "",
            )


def _text(chain: list[ast.ClassDef], name: str) -> str:
    """The text that the nearest class assigns to `name`; "" if none does."""
    for node in chain:
        for member in node.body:
            if isinstance(member, ast.Assign) and any(ast.unparse(t) == name for t in member.targets):
                return str(ast.literal_eval(member.value))
    return ""
