"""Lists for the terminal: a name, and below it what is said about it, in lines that fit the terminal."""

from __future__ import annotations

import inspect
import shutil
import textwrap
from collections.abc import Mapping
from typing import Any

import typer

_INDENT = "    "
_WIDEST = 110


def width() -> int:
    """Columns of the terminal, 80 where there is none; COLUMNS overrides both."""
    return min(shutil.get_terminal_size((80, 24)).columns, _WIDEST)


def show(name: str, facts: Mapping[str, str], *, text: str = "") -> None:
    """Print one entry; names and words are never cut, whatever the width.

    Args:
        name: In bold, on a line of its own.
        facts: Values by what they are; empty ones are left out.
        text: A paragraph after them.
    """
    typer.secho(name, bold=True)
    for key, value in facts.items():
        if value:
            typer.echo(wrapped(value, first=f"{_INDENT}{key + ':':<12}", rest=_INDENT + 12 * " "))
    if text:
        typer.echo(wrapped(text, first=_INDENT, rest=_INDENT))


def wrapped(text: str, *, first: str = "", rest: str = "") -> str:
    """`text` in lines that fit the terminal, broken at blanks only.

    Args:
        text: One paragraph.
        first: What the first line begins with.
        rest: What every other line begins with.
    """
    return textwrap.fill(
        text,
        width(),
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )


def defaults(signature: inspect.Signature) -> dict[str, Any]:
    """Defaults by argument, as JSON values; others as text."""
    found = {p.name: None if p.default is p.empty else p.default for p in signature.parameters.values()}
    return {k: v if isinstance(v, int | float | str | None) else str(v) for k, v in found.items()}
