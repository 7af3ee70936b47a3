"""`paceline strategies`: strategies and staleness policies, with their defaults and when to choose each."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer


def strategies(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the training strategies and staleness policies: arguments, defaults, and when to choose each."""
    from paceline import registry
    from paceline.strategies.base import staleness_policy
    from paceline.strategies.base.strategy import PACKAGE, class_of

    methods = {name: class_of(name) for name in registry.names(PACKAGE)}
    policies = {name: staleness_policy.class_of(name) for name in registry.names(staleness_policy.PACKAGE)}
    if as_json:
        found = {"strategies": _rows(methods), "staleness_policies": _rows(policies)}
        typer.echo(json.dumps(found, indent=2))
        return
    _show("strategy", methods, 'Write arguments in brackets, e.g. --strategy "local_sgd(period=16)".\n')
    example = '"parameter_server(staleness=softsync(c=4)+inverse)"'
    _show("staleness policy", policies, f"For the parameter server; + combines several: {example}.")


def _rows(kinds: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"name": n, "defaults": _defaults(k), "advice": k.advice} for n, k in kinds.items()]


def _show(title: str, kinds: Mapping[str, Any], example: str) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from paceline import spec

    console = Console()
    if not console.is_terminal:
        console.width = 400  # whole lines for grep
    table = Table(title, "arguments and defaults", "advice", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for name, kind in kinds.items():
        table.add_row(f"[bold]{name}[/bold]", escape(spec.signature(kind)), kind.advice)
    console.print(table)
    console.print(example, style="dim")


def _defaults(kind: type) -> dict[str, Any]:
    """Defaults by argument, as JSON values; others as text."""
    parameters = inspect.signature(kind).parameters.values()
    found = {p.name: None if p.default is p.empty else p.default for p in parameters}
    return {k: v if isinstance(v, int | float | str | None) else str(v) for k, v in found.items()}


def register(app: typer.Typer) -> None:
    """Add `paceline strategies` to the command line."""
    app.command("strategies")(strategies)
