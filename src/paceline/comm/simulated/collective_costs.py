"""What a collective costs on a topology: the schedule simulator's time of the fastest algorithm.

All of `paceline.collectives` are candidates, as in `paceline schedule compare`, among the ranks that take
part and over the links that they have. Each is simulated at no bytes and at powers of 16 bytes; between two
of these sizes its time is nearly a straight line, which says who is fastest. That one is simulated at the
very size, for the first `EXACT_SIZES` sizes of an operation; then the line has to do, so that a run with
ever-changing sizes stays quick. All is kept: a lookup takes microseconds.
"""

from __future__ import annotations

import inspect
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
class Members(Topology):
    """Some ranks of a topology, numbered anew; all its links are there."""

    whole: Topology | None = None
    ranks: IntArray | None = None

    @classmethod
    def of(cls, whole: Topology, ranks: Sequence[int]) -> Topology:
        """`whole` itself if it has no other ranks."""
        if list(ranks) == list(range(whole.num_ranks)):
            return whole
        hosts = tuple(whole.hosts[r] for r in ranks)
        costs = (whole.link_latency_s, whole.link_seconds_per_byte)
        each = (whole.reduce_seconds_per_byte, whole.overhead_s)
        return cls(whole.name, hosts, *costs, *each, whole, np.asarray(ranks, dtype=np.intp))

    def path(self, src: IntArray, dst: IntArray, channel: IntArray | int = 0) -> IntArray:
        """Links that the same ranks take in the whole topology."""
        assert self.whole is not None and self.ranks is not None
        return self.whole.path(self.ranks[src], self.ranks[dst], channel)

    def ends(self) -> tuple[IntArray, IntArray]:
        """Of the whole topology's nodes."""
        assert self.whole is not None
        return self.whole.ends()

    def to_json(self) -> dict[str, Any]:
        """The whole topology's."""
        assert self.whole is not None
        return self.whole.to_json()


class CollectiveCosts:
    """Seconds of collectives among `ranks` of a topology."""

    def __init__(self, topology: Topology, ranks: Sequence[int]) -> None:
        self._topology = Members.of(topology, ranks)
        self._seconds: dict[tuple[str, str], dict[int, float]] = {}
        self._times: dict[tuple[str, str, int], FloatArray] = {}
        self._programs: dict[tuple[str, str], list[Program]] = {}

    def seconds(self, operation: str, num_bytes: int, algorithm: str = "") -> float:
        """Of one operation whose full buffer has `num_bytes`; without `algorithm`, by the fastest one.

        ConfigError if no algorithm, or not the named one, does the operation among so many ranks.
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
        """Seconds of every candidate, on the line between two simulated sizes."""
        steps = (max(num_bytes, 1).bit_length() - 1) // _RATIO_BITS
        low, high = (1 << _RATIO_BITS * (steps + i) for i in (0, 1))
        low = low if steps else 0
        at_low, at_high = (self._at(operation, algorithm, size) for size in (low, high))
        return at_low + (at_high - at_low) * ((num_bytes - low) / (high - low))

    def _at(self, operation: str, algorithm: str, num_bytes: int) -> FloatArray:
        """Seconds of every candidate."""
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
        """Told which ranks share a host, if some do and it wants to know; None if it cannot do it."""
        topology = self._topology
        options: dict[str, Any] = {}
        takes = inspect.signature(collectives.find(name).build).parameters
        if "hosts" in takes and 1 < len(topology.host_names) < topology.num_ranks:
            options["hosts"] = topology.hosts
        answer = collectives.supports(name, operation, topology.num_ranks, **options)
        if not answer:
            return None
        return collectives.build(name, operation, topology.num_ranks, **options)


def _is_meant(name: str, operation: str) -> bool:
    return operation in collectives.find(name).OPERATIONS
