"""What every parser of user input needs: numbers, JSON and files that are bounded and raise our own errors.

Python's own `int` takes `²` for a digit (after `isdigit`), `json` overflows the stack on `[[[[…`, and a
file may be a folder, a device without end, or bytes in no encoding. A parser that uses these functions has
one kind of error and a limit on time and memory.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from paceline.errors import ConfigError

MOST_BYTES = 64 << 20
"""Largest file that is read as a user's text, unless a caller says otherwise."""
_MOST_DIGITS = 18


def digits(text: str) -> int | None:
    """The number that 1 to 18 of the digits 0 … 9 write; None for anything else."""
    is_number = text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS
    return int(text) if is_number else None


def shortened(text: str) -> str:
    """Return `text` in quotes for an error message, with its middle left out if it is long."""
    return repr(text if len(text) <= 200 else f"{text[:150]} … {text[-30:]}")


def parse_json(text: str | bytes, *, what: str) -> Any:
    """Parse JSON.

    Args:
        text: The JSON; bytes are UTF-8.
        what: Names it in errors: "topology file a.json".

    Raises:
        ConfigError: It is not JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ConfigError(f"{what}: JSON expected, got brackets nested too deeply to read") from None
    except ValueError as error:  # also text in no encoding, and numbers of thousands of digits
        raise ConfigError(f"{what}: JSON expected: {error}") from None


def read_text(path: str | os.PathLike[str], *, what: str, most_bytes: int = MOST_BYTES) -> str:
    """Read a user's text file in UTF-8.

    Args:
        path: The file.
        what: Names the kind of file in errors: "topology file".
        most_bytes: Largest file that is accepted, in bytes; default 64 MiB.

    Raises:
        ConfigError: There is no such file, it is too large, or it is not text.
    """
    try:
        with Path(path).open("rb") as file:
            if stat.S_ISCHR(os.fstat(file.fileno()).st_mode):
                raise ConfigError(f"{what} {path}: a file expected, got a device")
            data = file.read(most_bytes + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ConfigError(f"{what} {shortened(os.fspath(path))} cannot be read: {error}") from None
    if len(data) > most_bytes:
        raise ConfigError(f"{what} {path}: at most {most_bytes} bytes expected")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} {path}: text in UTF-8 expected: {error}") from None


def read_json(path: str | os.PathLike[str], *, what: str) -> Any:
    """Read a JSON file; arguments and errors as of `read_text` and `parse_json`."""
    return parse_json(read_text(path, what=what), what=f"{what} {path}")
