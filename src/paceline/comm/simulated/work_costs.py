"""What local work costs on this machine: timed once for each kind and size, then always the same.

A list of costs that is written down and given again makes a simulation repeat exactly.
"""

from __future__ import annotations

import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from paceline import local_work, user_input
from paceline.errors import ConfigError
from paceline.local_work import Rehearsal

NONE, MEASURED = "none", "measured"
Measure = Callable[[str, int, Rehearsal], float]
"""Seconds of a work, from its name, its number of elements and its rehearsal."""
_FEWEST, _MOST = 5, 25
_SECONDS = 0.1
_TOUCHED = 4  # parameters, gradients, momentum, activations
_DIGITS = 2  # as for compute times: two measurements hardly agree on more

_measured: dict[tuple[str, int], float] = {}
_lock = threading.Lock()


class WorkCosts:
    """Seconds of local work by its name and number of elements.

    Args:
        known: Costs that were measured before: name → number of elements → seconds.
        measure: What tells the others; default: this machine, once per process.

    Raises:
        ConfigError: A cost is no finite number of at least 0.
    """

    def __init__(
        self, known: Mapping[str, Mapping[str, float]] | None = None, *, measure: Measure | None = None
    ) -> None:
        self._known = _checked(known or {})
        self._measure = measure or once_per_process
        self._used: dict[tuple[str, int], float] = {}

    def seconds(self, name: str, numel: int, rehearsal: Rehearsal) -> float:
        """How long the work takes once."""
        key = (name, numel)
        if key not in self._used:
            known = self._known.get(key)
            self._used[key] = self._measure(name, numel, rehearsal) if known is None else known
        return self._used[key]

    def used(self) -> dict[str, dict[str, float]]:
        """All costs that were asked for so far, as plain data that `known` takes."""
        plain: dict[str, dict[str, float]] = {}
        for name, numel in sorted(self._used):
            plain.setdefault(name, {})[str(numel)] = self._used[name, numel]
        return plain


def make(costs: str | WorkCosts) -> WorkCosts | None:
    """The costs that `costs` names; None for `none`. Raises ConfigError."""
    if isinstance(costs, WorkCosts):
        return costs
    if costs == NONE:
        return None
    if costs == MEASURED:
        return WorkCosts()
    raise ConfigError(f"work costs {costs!r}: {NONE}, {MEASURED} or WorkCosts expected")


def read(path: str | os.PathLike[str]) -> WorkCosts:
    """The costs under "costs" in a JSON file, as a comparison writes it. Raises ConfigError."""
    written = user_input.read_json(path, what="costs of local work")
    if not isinstance(written, dict) or "costs" not in written:
        raise ConfigError(
            f'costs of local work {path}: a file with "costs" expected, as a simulated comparison writes it '
            "with --json"
        )
    return WorkCosts(written["costs"])


def is_cost(value: object) -> bool:
    """Whether `value` is a finite number of at least 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max


def once_per_process(name: str, numel: int, rehearsal: Rehearsal) -> float:
    """Measured costs, kept for as long as the process lives."""
    with _lock:
        if (name, numel) not in _measured:
            _measured[name, numel] = timed(numel, rehearsal)
        return _measured[name, numel]


def timed(numel: int, rehearsal: Rehearsal) -> float:
    """Seconds of one work, the median of several on one thread; the first is the warm-up.

    In between, vectors of its size are touched as training does, which takes large ones out of the caches.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found: list[float] = []
    others = torch.zeros(_TOUCHED * numel)
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), local_work.unheard():
            rehearsal()()
            while len(found) < _FEWEST or (len(found) < _MOST and sum(found) < _SECONDS):
                work = rehearsal()
                others.add_(1)
                start = time.perf_counter()
                work()
                found.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return float(f"{statistics.median(found):.{_DIGITS}g}")


def _checked(known: Any) -> dict[tuple[str, int], float]:
    """The costs by name and number of elements; they may come from a file."""
    checked: dict[tuple[str, int], float] = {}
    if not isinstance(known, Mapping) or not all(isinstance(sizes, Mapping) for sizes in known.values()):
        raise ConfigError(f"work costs: name → number of elements → seconds expected, got {known!r:.80}")
    for name, sizes in known.items():
        for numel, seconds in sizes.items():
            if not is_cost(seconds) or user_input.digits(str(numel)) is None:
                raise ConfigError(
                    f"work costs: {name}: {numel!r}: {seconds!r}: a number of elements, and a finite number "
                    "of seconds of at least 0 expected"
                )
            checked[name, int(numel)] = float(seconds)
    return checked
