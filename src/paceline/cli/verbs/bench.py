"""`paceline bench`: one command per file of `cli/benchmarks`."""

from __future__ import annotations

import typer

from paceline import registry


def register(app: typer.Typer) -> None:
    """Add `paceline bench`, with one command per benchmark."""
    group = typer.Typer(
        help="Benchmarks of this machine. Each prints a table and can write JSON and HTML.",
        no_args_is_help=True,
    )
    for benchmark in registry.discover("paceline.cli.benchmarks").values():
        benchmark.register(group)
    app.add_typer(group, name="bench")
