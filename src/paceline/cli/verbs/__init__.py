"""One file per command of `paceline`.

A command's file defines `register(app: typer.Typer) -> None`. It imports what is heavy (torch above all)
inside its functions, because every start of `paceline` imports every command.
"""
