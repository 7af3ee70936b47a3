"""`paceline strategies`: what exists, with defaults and advice."""

from __future__ import annotations

import inspect
import json
from typing import Annotated, Any

import typer


def strategies(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the training strategies: name, arguments with their defaults, and when to choose each."""
    from paceline import registry, spec
    from paceline.strategies.strategy import PACKAGE, class_of

    rows = []
    for name in registry.names(PACKAGE):
        kind = class_of(name)
        rows.append((name, kind, spec.signature(kind)))
    if as_json:
        found = [{"name": n, "defaults": _defaults(k), "advice": k.advice} for n, k, _ in rows]
        typer.echo(json.dumps({"strategies": found}, indent=2))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console.width = 400  # whole lines for grep
    table = Table(
        "strategy", "arguments and defaults", "advice", box=None, pad_edge=False, padding=(0, 3, 0, 0)
    )
    for name, kind, arguments in rows:
        table.add_row(f"[bold]{name}[/bold]", escape(arguments), kind.advice)
    console.print(table)
    console.print('Write arguments in brackets, e.g. --strategy "local_sgd(period=16)".', style="dim")


def _defaults(kind: type) -> dict[str, Any]:
    """Argument → default, as JSON can say it."""
    parameters = inspect.signature(kind).parameters.values()
    found = {p.name: None if p.default is p.empty else p.default for p in parameters}
    return {k: v if isinstance(v, int | float | str | None) else str(v) for k, v in found.items()}


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("strategies")(strategies)
