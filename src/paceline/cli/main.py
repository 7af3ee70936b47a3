"""Entry point of the `paceline` command."""

from __future__ import annotations

import inspect
import sys

import typer

from paceline import __version__, registry
from paceline.errors import PacelineError

app = typer.Typer(
    name="paceline",
    help="Train one PyTorch model on many workers, by any data-parallel method.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"paceline {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version and stop."
    ),
) -> None:
    """Train one PyTorch model on many workers, by any data-parallel method."""


def _join_lines(group: typer.Typer) -> None:
    """Join the lines of help texts, which would otherwise break where the docstrings' lines end."""
    for command in group.registered_commands:
        if command.callback is not None:
            paragraphs = (inspect.getdoc(command.callback) or "").split("\n\n")
            command.help = "\n\n".join(" ".join(p.split()) for p in paragraphs)
    for child in group.registered_groups:
        if child.typer_instance is not None:
            _join_lines(child.typer_instance)


for _verb in registry.discover("paceline.cli.verbs").values():
    _verb.register(app)
_join_lines(app)


def main() -> None:
    """Run the command; a PacelineError becomes one clear line and exit code 2."""
    try:
        app()
    except PacelineError as error:
        typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
