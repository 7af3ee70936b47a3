"""The command line: `main.py` and one file per verb.

A verb's file defines `register(app: typer.Typer) -> None`. It imports what is heavy (torch above all)
inside its functions, because every start of `paceline` imports every verb.
"""

NOT_PLUGINS = ("main",)
