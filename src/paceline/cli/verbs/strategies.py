"""`paceline strategies`: strategies and staleness policies, with their defaults and when to choose each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paceline.cli import entries
from paceline.cli.arguments.plugins import Plugins

if TYPE_CHECKING:
    from paceline.declarations import Declaration


_HOW_TO_WRITE = (
    'Write arguments in parentheses: --strategy "local_sgd(period=16)". Periods are in minibatches. (chosen):'
    " what suits the run's length, unless you give a number."
)


def strategies(
    plugin: Plugins = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """List the training strategies and staleness policies: arguments, defaults, and when to choose each."""
    from paceline import declarations

    methods = declarations.read_all("paceline.strategies")
    policies = declarations.read_all("paceline.strategies.staleness")
    if as_json:
        found = {"strategies": _rows(methods), "staleness_policies": _rows(policies)}
        typer.echo(json.dumps(found, indent=2))
        return
    _show(methods)
    typer.echo(entries.wrapped(_HOW_TO_WRITE) + "\n")
    typer.echo(entries.wrapped("Staleness policies, for the argument staleness of parameter_server:") + "\n")
    _show(policies)
    typer.echo(
        entries.wrapped('+ joins several policies: "parameter_server(staleness=softsync(c=4)+inverse)".')
    )


def _rows(found: Mapping[str, Declaration]) -> list[dict[str, Any]]:
    return [
        {"name": name, "defaults": entries.defaults(d.signature), "advice": d.advice}
        for name, d in found.items()
    ]


def _show(found: Mapping[str, Declaration]) -> None:
    from paceline import spec

    for name, declared in found.items():
        entries.show(name, {"arguments": spec.shown(declared.signature)}, text=declared.advice)
    typer.echo()


def register(app: typer.Typer) -> None:
    """Add `paceline strategies` to the command line."""
    app.command("strategies")(strategies)
