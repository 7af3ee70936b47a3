"""What a collective costs on a topology: the schedule simulator's time of the fastest algorithm.

All of `paceline.collectives` are candidates, as in `paceline schedule compare`, among the ranks that take
part and over the links between them. Each is simulated at 0 bytes and at powers of 16 bytes. Between two of
these sizes its time is nearly linear, which is enough to choose the fastest. The fastest is then simulated at
the exact size, for the first `EXACT_SIZES` sizes of an operation; for further sizes the linear estimate is
used, so that a run with ever-changing sizes stays quick. All results are kept: a lookup takes microseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from paceline import collectives
from paceline.errors import ConfigError
from paceline.schedule.program import Program
from paceline.schedule.simulation.simulate import simulate
from paceline.schedule.topology import FloatArray, IntArray, Topology

EXACT_SIZES = 64
_RATIO_BITS = 4


@dataclass(frozen=True, eq=False)
class SubTopology(Topology):
    """Some ranks of a topology, numbered from 0; it keeps all links."""

    whole: Topology | None = None
    ranks: IntArray | None = None

    @classmethod
    def of(cls, whole: Topology, ranks: Sequence[int]) -> Topology:
        """The topology of these `ranks` of `whole`; `whole` itself if these are all, in order."""
        if list(ranks) == list(range(whole.num_ranks)):
            return whole
        hosts = tuple(whole.hosts[r] for r in ranks)
        return cls(
            whole.name,
            hosts,
            whole.link_latency_s,
            whole.link_seconds_per_byte,
            whole.reduce_seconds_per_byte,
            whole.overhead_s,
            whole,
            np.asarray(ranks, dtype=np.intp),
        )

    def path(self, src: IntArray, dst: IntArray, channel: IntArray | int = 0) -> IntArray:
        """Links that the same ranks take in the whole topology."""
        assert self.whole is not None and self.ranks is not None
        return self.whole.path(self.ranks[src], self.ranks[dst], channel)

    def ends(self) -> tuple[IntArray, IntArray]:
        """Nodes at the ends of each link, numbered as in the whole topology."""
        assert self.whole is not None
        return self.whole.ends()

    def to_json(self) -> dict[str, Any]:
        """Describe the whole topology."""
        assert self.whole is not None
        return self.whole.to_json()


class CollectiveCosts:
    """Seconds of collectives among `ranks` of a topology."""

    def __init__(self, topology: Topology, ranks: Sequence[int]) -> None:
        self._topology = SubTopology.of(topology, ranks)
        self._seconds: dict[tuple[str, str], dict[int, float]] = {}
        self._times: dict[tuple[str, str, int], FloatArray] = {}
        self._programs: dict[tuple[str, str], list[Program]] = {}

    def seconds(self, operation: str, num_bytes: int, algorithm: str = "") -> float:
        """Seconds of one operation.

        Args:
            operation: "all_reduce", "broadcast", …
            num_bytes: Size of the full buffer of one rank.
            algorithm: Name of an algorithm; "" for the fastest.

        Raises:
            ConfigError: No algorithm, or not the named one, does the operation among these ranks.
        """
        if self._topology.num_ranks == 1:
            return 0.0
        known = self._seconds.setdefault((operation, algorithm), {})
        seconds = known.get(num_bytes)
        if seconds is None:
            times = self._between(operation, algorithm, num_bytes)
            if len(known) >= EXACT_SIZES:
                return float(times.min())
            fastest = self._candidates(operation, algorithm)[int(times.argmin())]
            seconds = known[num_bytes] = float(simulate(fastest, self._topology, num_bytes).time_s)
        return seconds

    def _between(self, operation: str, algorithm: str, num_bytes: int) -> FloatArray:
        """Seconds of every candidate, interpolated between two simulated sizes."""
        steps = (max(num_bytes, 1).bit_length() - 1) // _RATIO_BITS
        low, high = (1 << _RATIO_BITS * (steps + i) for i in (0, 1))
        low = low if steps else 0
        at_low, at_high = (self._at(operation, algorithm, size) for size in (low, high))
        return at_low + (at_high - at_low) * ((num_bytes - low) / (high - low))

    def _at(self, operation: str, algorithm: str, num_bytes: int) -> FloatArray:
        """Seconds of every candidate, simulated."""
        key = (operation, algorithm, num_bytes)
        if key not in self._times:
            programs = self._candidates(operation, algorithm)
            times = [simulate(p, self._topology, num_bytes).time_s for p in programs]
            self._times[key] = np.array(times)
        return self._times[key]

    def _candidates(self, operation: str, algorithm: str) -> list[Program]:
        key = (operation, algorithm)
        if key not in self._programs:
            names = [algorithm] if algorithm else collectives.names()
            found = [self._program(n, operation) for n in names if algorithm or _is_meant(n, operation)]
            self._programs[key] = [p for p in found if p is not None]
            if not self._programs[key]:
                who = f"{algorithm} cannot" if algorithm else "no algorithm can"
                raise ConfigError(f"{who} do {operation} among {self._topology.num_ranks} ranks")
        return self._programs[key]

    def _program(self, name: str, operation: str) -> Program | None:
        """The algorithm's program, with hosts if it takes them and ranks share some; None if it cannot."""
        topology = self._topology
        options = collectives.with_hosts(name, {}, topology.hosts)
        answer = collectives.supports(name, operation, topology.num_ranks, **options)
        if not answer:
            return None
        return collectives.build(name, operation, topology.num_ranks, **options)


def _is_meant(name: str, operation: str) -> bool:
    return operation in collectives.find(name).OPERATIONS
