"""What was measured of this machine before: it stays as long as new measurements confirm it.

The order of messages of asynchronous methods depends on every microsecond, and so do their accuracies. Two
comparisons that measure costs a few percent apart are therefore given the same ones, and are the same run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from paceline import user_cache, user_input
from paceline.bench import hardware
from paceline.comm.simulated.work_costs import is_cost
from paceline.errors import ConfigError

AGREEMENT = 1.25
"""Measurements within this factor confirm each other."""


class Calibration:
    """The measurements that one file keeps.

    Args:
        path: The file; default: that of this machine, in the user's cache folder. One that cannot be read
            counts as empty, and one that cannot be written is not.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path or cache_file()
        self._kept = _read(self._path)
        self._new: dict[str, list[float]] = {}

    def confirmed(
        self,
        name: str,
        measured: Sequence[float],
        compared: Callable[[Sequence[float]], Sequence[float]] = lambda values: values,
    ) -> list[float]:
        """What is kept under `name` if `measured` agrees with it; else `measured`, which is kept from now on.

        Args:
            name: What was measured.
            measured: The figures of now.
            compared: Makes of such figures those that have to agree.
        """
        kept = self._kept.get(name)
        if kept is not None and len(kept) == len(measured) and _agree(compared(kept), compared(measured)):
            return kept
        self._kept[name] = self._new[name] = list(measured)
        self._write()
        return list(measured)

    def _write(self) -> None:
        """Replace the file at once; what others have written meanwhile stays in it."""
        whole = {**_read(self._path), **self._new}
        user_cache.replace(self._path, json.dumps(whole, indent=1, sort_keys=True) + "\n")


def cache_file() -> Path:
    """The file of this processor with these versions of Paceline, torch and Python."""
    facts = {k: v for k, v in hardware.describe().items() if k not in ("memory_gib", "system")}
    return user_cache.path_of("simulated-costs", facts)


def _read(path: Path) -> dict[str, list[float]]:
    try:
        written = user_input.read_json(path, what="measured costs")
    except ConfigError:
        return {}
    rows = written.items() if isinstance(written, dict) else ()
    return {name: values for name, values in rows if isinstance(values, list) and all(map(is_cost, values))}


def _agree(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(x <= AGREEMENT * y and y <= AGREEMENT * x for x, y in zip(a, b, strict=True))
