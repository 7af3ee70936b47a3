"""Measure, and write JSON. A benchmark is a file that defines `register(app: typer.Typer) -> None`.

It imports what is heavy inside its functions, as the verbs of the command line do.
"""

NOT_PLUGINS = ("imagenet_ways", "rows")
