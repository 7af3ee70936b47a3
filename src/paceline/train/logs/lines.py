"""What the text formats share: a row is a line, and half a line at the end is the mark of a crash."""

from __future__ import annotations

import os
from pathlib import Path

_CHUNK_BYTES = 1 << 16


def cut_unfinished_line(path: Path) -> None:
    """Remove what follows the last newline of the file at `path`, if there is such a file."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - _CHUNK_BYTES)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                file.truncate(start + newline + 1)
                return
            end = start
        file.truncate(0)
