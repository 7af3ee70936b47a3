"""JSON lines: one object a row, appended and flushed. A number that is not finite becomes a string."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paceline.train.logs.lines import cut_unfinished_line


def open_log(folder: Path, name: str, first_step: int | None) -> JsonLines:
    """Open `name`.jsonl in `folder` for appending."""
    return JsonLines(folder / f"{name}.jsonl")


class JsonLines:
    """One file of JSON objects."""

    def __init__(self, path: Path) -> None:
        cut_unfinished_line(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row as a JSON object and flush it."""
        self._file.write(json.dumps({key: _strict(value) for key, value in row.items()}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Flush and close; further rows are an error."""
        self._file.close()


def _strict(value: object) -> object:
    # JSON has no NaN, and a reader that follows the standard would reject the whole line.
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
