"""Which program is fastest at each size on a topology, and at which sizes that changes.

Candidates are given as programs, so this module knows no algorithm by name.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from paceline.errors import ConfigError
from paceline.schedule.program import Program
from paceline.schedule.simulation.simulate import Conditions, simulate
from paceline.schedule.topology import Topology


@dataclass(frozen=True)
class SizeTimes:
    """Simulated times at one size, fastest first."""

    num_bytes: int
    times_s: Mapping[str, float]

    @property
    def fastest(self) -> str:
        """Name of the fastest program; the first by name on a tie."""
        return next(iter(self.times_s))


@dataclass(frozen=True)
class Crossover:
    """A size where the fastest changes: `before` below `num_bytes`, `after` from there on."""

    num_bytes: int
    before: str
    after: str


@dataclass(frozen=True)
class AlgorithmComparison:
    """Rows by size, and the sizes where the fastest changes, ascending."""

    rows: Sequence[SizeTimes]
    crossovers: Sequence[Crossover]


def compare(
    candidates: Mapping[str, Program],
    topology: Topology,
    sizes: Sequence[int],
    *,
    conditions: Conditions | None = None,
) -> AlgorithmComparison:
    """Simulate every candidate at every size (bytes of the full buffer) and locate the crossovers."""
    if not candidates:
        raise ConfigError("nothing to compare: no algorithm supports this operation and number of ranks")
    if not sizes or min(sizes) < 0:
        raise ConfigError(f"sizes of at least 0 bytes expected, got {list(sizes)}")

    def row(num_bytes: int) -> SizeTimes:
        times = {
            n: simulate(p, topology, num_bytes, conditions=conditions).time_s for n, p in candidates.items()
        }
        # Equal up to rounding is a tie, which goes by name, so that results do not depend on the last bit.
        order = sorted(times, key=lambda n: (float(f"{times[n]:.9g}"), n))
        return SizeTimes(num_bytes, {n: times[n] for n in order})

    rows = [row(n) for n in sorted(set(sizes))]
    crossovers = []
    for low, high in itertools.pairwise(rows):
        while low.fastest != high.fastest:
            edge = _next_change(low, high, row)
            crossovers.append(Crossover(edge.num_bytes, low.fastest, edge.fastest))
            low = edge
    return AlgorithmComparison(rows, crossovers)


def _next_change(low: SizeTimes, high: SizeTimes, row: Callable[[int], SizeTimes]) -> SizeTimes:
    """Find the smallest size (to 1 %) at which `low`'s fastest is no longer fastest, by bisection."""
    winner = low.fastest
    while high.num_bytes - low.num_bytes > max(1, low.num_bytes // 100):
        middle = math.isqrt(max(low.num_bytes, 1) * high.num_bytes)
        middle = min(max(middle, low.num_bytes + 1), high.num_bytes - 1)
        tried = row(middle)
        if tried.fastest == winner:
            low = tried
        else:
            high = tried
    return high
