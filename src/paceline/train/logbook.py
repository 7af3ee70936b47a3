"""Measurements of a run as rows: `log.jsonl` (one JSON object a line) and `log.csv` (a table)."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Logbook:
    """Appends rows to both files in `folder`, which is made on the first row."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._columns: list[str] = []
        self._rows: list[dict[str, Any]] = []

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row; values that are one-element tensors become numbers."""
        plain = {key: _plain(value) for key, value in row.items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "log.jsonl").open("a") as lines:
            lines.write(json.dumps(plain) + "\n")
        new = [key for key in plain if key not in self._columns]
        self._columns += new
        self._rows.append(plain)
        # A new column changes the head of the table: write it afresh.
        rows = self._rows if new else [plain]
        with (self.folder / "log.csv").open("w" if new else "a", newline="") as table:
            writer = csv.DictWriter(table, self._columns, restval="")
            if new:
                writer.writeheader()
            writer.writerows(rows)


def default_folder() -> Path:
    """`runs/<date>-<time>` below the current folder."""
    return Path("runs") / time.strftime("%Y%m%d-%H%M%S")


def _plain(value: Any) -> Any:
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "numel", lambda: getattr(value, "size", 1))() == 1:
        return item()
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
