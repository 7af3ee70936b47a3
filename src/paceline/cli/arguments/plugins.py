"""The option --plugin of every command that takes names of methods, codecs or algorithms."""

from __future__ import annotations

from typing import Annotated

import typer


def load(paths: list[str] | None) -> list[str] | None:
    """Load the files before the command looks at its names."""
    from paceline import plugins

    for path in paths or ():
        plugins.load(path)
    return paths


Plugins = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        metavar="FILE.py",
        callback=load,
        help="Python file or folder with your own strategies, codecs, algorithms or staleness policies, each"
        " named after its file. Repeatable. Workers on other hosts load it from the same path or from their"
        " working folder.",
    ),
]
