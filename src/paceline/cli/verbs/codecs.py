"""`paceline codecs`: the ways to send a tensor in fewer bytes, with their defaults."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from paceline.cli import entries
from paceline.cli.arguments.plugins import Plugins


def codecs(
    plugin: Plugins = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """List the codecs, which compress what a strategy sends: what each does, arguments, defaults."""
    from paceline import declarations, spec

    found = declarations.read_all("paceline.codecs")
    if as_json:
        rows = [
            {"name": name, "defaults": entries.defaults(d.signature), "summary": d.summary}
            for name, d in found.items()
        ]
        typer.echo(json.dumps({"codecs": rows}, indent=2))
        return
    for name, declared in found.items():
        entries.show(name, {"arguments": spec.shown(declared.signature)}, text=declared.summary)
    typer.echo("\n" + entries.wrapped("(chosen): depends on the other arguments, as the codec's text says."))
    typer.echo("\nGive one to a strategy that has the argument codec:")
    typer.echo('    "local_sgd(period=16, codec=topk(density=0.01))"')


def register(app: typer.Typer) -> None:
    """Add `paceline codecs` to the command line."""
    app.command("codecs")(codecs)
