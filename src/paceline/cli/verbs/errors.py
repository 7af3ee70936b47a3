"""`paceline errors`: what an error means, its usual causes, how to find them, and what to do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from paceline.cli import entries


def errors(
    code: Annotated[
        str,
        typer.Argument(
            metavar="CODE",
            help="The code of an error, such as PL03, or its class, such as PeerLost.",
            show_default=False,
        ),
    ] = "",
) -> None:
    """Explain the error with this CODE: its causes, how to find them, what to do. Without CODE: list all.

    Where an error ends a command or a worker, its message ends with `(more: paceline errors CODE)`.
    """
    from paceline import registry
    from paceline.errors import ConfigError

    found = _sections()
    if not code:
        for title, paragraphs in found.items():
            entries.show(title, {}, text=paragraphs[0].removeprefix("Meaning. "))
        return
    for title, paragraphs in found.items():
        if code.lower() in title.lower().split():
            typer.secho(title, bold=True)
            for paragraph in paragraphs:
                typer.echo("\n" + _in_lines(paragraph))
            return
    raise ConfigError(registry.unknown("error", code, [word for title in found for word in title.split()]))


def _sections() -> dict[str, list[str]]:
    """The paragraphs under each title of `errors.md`, without emphasis."""
    import paceline

    page = Path(paceline.__file__).with_name("errors.md").read_text(encoding="utf-8")
    _, *sections = re.split(r"^## ", page.replace("**", ""), flags=re.MULTILINE)
    titles = [section.partition("\n")[::2] for section in sections]
    return {title: body.strip("\n").split("\n\n") for title, body in titles}


def _in_lines(paragraph: str) -> str:
    """As wide as the terminal; an example, which is indented, stays so."""
    indent = "    " if paragraph.startswith("    ") else ""
    return entries.wrapped(" ".join(paragraph.split()), first=indent, rest=indent)


def register(app: typer.Typer) -> None:
    """Add `paceline errors` to the command line."""
    app.command("errors")(errors)
