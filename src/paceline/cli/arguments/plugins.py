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
        help="A file or folder with strategies, codecs, algorithms or staleness policies of yours, which are"
        " called like their files. Repeatable. Workers load it too: on other hosts from the same path, or"
        " from the folder where they run.",
    ),
]
