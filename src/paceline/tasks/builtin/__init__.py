"""The built-in tasks.

A task's file defines `build() -> Task`; one that reads a file takes it as `build(data)`.
"""
