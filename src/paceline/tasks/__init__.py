"""The built-in tasks, and the contract of a user's own.

A task's file defines `build() -> Task`; a built-in one that reads a file takes it as `build(data)`.
"""

NOT_PLUGINS = ("load", "task")
