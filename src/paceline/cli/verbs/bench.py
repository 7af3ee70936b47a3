"""`paceline bench`: one command per file of `cli/benchmarks`."""

from __future__ import annotations

import typer

from paceline import registry


def register(app: typer.Typer) -> None:
    """Add the verb and, below it, one command per benchmark."""
    group = typer.Typer(help="Measure: every benchmark prints a table and writes JSON.", no_args_is_help=True)
    for benchmark in registry.discover("paceline.cli.benchmarks").values():
        benchmark.register(group)
    app.add_typer(group, name="bench")
