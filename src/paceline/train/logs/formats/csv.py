"""A table with a head line; a row with a new column rewrites the file with a longer head."""

from __future__ import annotations

import csv
import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO, cast

from paceline.train.logs.lines import cut_unfinished_line

_KEEP = "surrogateescape"


def open_log(folder: Path, name: str, first_step: int | None) -> Table:
    """Append to `name`.csv, whose columns are kept."""
    return Table(folder / f"{name}.csv")


class Table:
    """One file of comma-separated values."""

    def __init__(self, path: Path) -> None:
        self._path = path
        cut_unfinished_line(path)
        self._columns: list[str] = []
        if path.exists():
            with self._opened("r") as file:
                try:
                    self._columns = next(csv.reader(file), [])
                except csv.Error as error:
                    raise self._is_no_table(error) from error
        self._open()

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row; absent columns stay empty."""
        if new := [key for key in row if key not in self._columns]:
            self._widen(new)
        # A row is a line, so that the end of a crashed run can be cut off.
        flat = {k: " ".join(v.splitlines()) if isinstance(v, str) else v for k, v in row.items()}
        self._writer.writerow(flat)
        self._file.flush()

    def close(self) -> None:
        """Flush and close; further rows are an error."""
        self._file.close()

    def _open(self) -> None:
        self._file = self._opened("a")
        self._writer = csv.DictWriter(self._file, self._columns, restval="", lineterminator="\n")

    def _opened(self, mode: str) -> TextIO:
        # A user may have edited the file in another encoding: such bytes are kept as they are.
        return cast(TextIO, self._path.open(mode, newline="", encoding="utf-8", errors=_KEEP))

    def _is_no_table(self, error: csv.Error) -> OSError:
        return OSError(errno.EINVAL, f"it is no table ({error}); move the file away", str(self._path))

    def _widen(self, new: list[str]) -> None:
        self._file.close()
        with self._opened("r") as file:
            try:
                rows = list(csv.DictReader(file))
            except csv.Error as error:
                raise self._is_no_table(error) from error
        self._columns += new
        partial = self._path.with_name(f".{self._path.name}.tmp")
        with partial.open("w", newline="", encoding="utf-8", errors=_KEEP) as file:
            writer = csv.DictWriter(
                file, self._columns, restval="", extrasaction="ignore", lineterminator="\n"
            )
            writer.writeheader()
            writer.writerows(rows)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._path)
        self._open()
