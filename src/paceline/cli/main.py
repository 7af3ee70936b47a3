"""Entry point of the `paceline` command."""

from __future__ import annotations

import inspect
import sys

import typer

from paceline import __version__, registry
from paceline.errors import PacelineError, reference

_VERBS = "paceline.cli.verbs"
_HELP = "Train one PyTorch model on many workers, with any data-parallel method."


def make_app(only: str = "") -> typer.Typer:
    """Make the command line.

    Args:
        only: The one command that will be called, whose file alone is imported; "" or an unknown name: all.
    """
    app = typer.Typer(
        name="paceline",
        help=_HELP,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(help=_HELP)(_root)
    names = registry.names(_VERBS)
    for name in [only] if only in names else names:
        registry.load(_VERBS, name, kind="command").register(app)
    _join_lines(app)
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"paceline {__version__}")
        raise typer.Exit


def _root(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    pass


def _join_lines(group: typer.Typer) -> None:
    """Join the lines of help texts, which would otherwise break where the docstrings' lines end."""
    for command in group.registered_commands:
        if command.callback is not None:
            paragraphs = (inspect.getdoc(command.callback) or "").split("\n\n")
            command.help = "\n\n".join(" ".join(p.split()) for p in paragraphs)
    for child in group.registered_groups:
        if child.typer_instance is not None:
            _join_lines(child.typer_instance)


def main() -> None:
    """Run the command; a PacelineError becomes one clear line and exit code 2."""
    try:
        make_app(next(iter(sys.argv[1:]), ""))()
    except PacelineError as error:
        message = typer.style(f"error: {error}", fg=typer.colors.RED)
        typer.echo(f"{message} {reference(type(error))}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
