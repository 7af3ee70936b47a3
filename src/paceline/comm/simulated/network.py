"""The simulated network: how long a message or a collective takes on a Topology, in virtual seconds.

Networks are named as in `paceline.schedule.topologies`: ethernet(gbit=1), cluster(hosts=8, local=4), …

A message passes the links between its ends one after the other (cut-through): it occupies each for the
topology's overhead per message and bytes × seconds_per_byte, and a link serves messages in order of arrival.
Messages of a worker to itself are free. A collective takes what the schedule simulator says
(`collective_costs`); it does not compete with messages for links.
"""

from __future__ import annotations

import numpy as np

from paceline.comm.simulated.collective_costs import CollectiveCosts
from paceline.comm.simulated.faults import FOREVER, Faults
from paceline.schedule.topologies import Topology

HEADER_BYTES = 128
"""Approximate wire bytes of a message in addition to its tensors: the frame and packet headers."""


class SimulatedNetwork:
    """The links of a topology and the time at which each is free again."""

    header_bytes = HEADER_BYTES

    def __init__(self, topology: Topology, faults: Faults) -> None:
        self.topology = topology
        self._faults = faults
        self._latency_s = topology.link_latency_s.tolist()
        self._seconds_per_byte = topology.link_seconds_per_byte.tolist()
        self._free_s = [0.0] * topology.num_links
        self._paths: dict[tuple[int, int], list[int]] = {}
        self._costs: dict[tuple[int, ...], CollectiveCosts] = {}
        ranks = np.arange(topology.num_ranks)
        ring = topology.path(ranks, np.roll(ranks, -1)) if topology.num_ranks > 1 else None
        self._alpha_s = 0.0 if ring is None else float(topology.latency_s(ring).max())

    @property
    def latency_s(self) -> float:
        """Largest latency between neighbours."""
        return self._alpha_s

    def leaves_s(self, src: int, dst: int, now_s: float) -> float:
        """Earliest time at which faults let a message leave that is sent now; infinite if never."""
        return now_s if src == dst else self._faults.open_at(src, dst, now_s)

    def pass_link(
        self, link: int, num_bytes: int, first_byte_s: float, arrived_s: float
    ) -> tuple[float, float]:
        """Reserve `link` for a message; returns when its first and last byte reach the link's other end.

        Args:
            link: Index of the link.
            num_bytes: Size of the message's tensors.
            first_byte_s: When the first byte is at the link.
            arrived_s: When the last byte is at the link.
        """
        latency_s = self._latency_s[link]
        start_s = max(first_byte_s, self._free_s[link])
        busy_s = self.topology.overhead_s + (num_bytes + HEADER_BYTES) * self._seconds_per_byte[link]
        self._free_s[link] = start_s + busy_s
        return start_s + latency_s, max(arrived_s, self._free_s[link]) + latency_s

    def backlog_bytes(self, src: int, dst: int, now_s: float) -> tuple[float, float]:
        """Bytes that wait at the first link from src to dst, and that link's seconds per byte."""
        path = self.path(src, dst)
        if not path or not self._seconds_per_byte[path[0]]:
            return 0.0, 0.0
        cost = self._seconds_per_byte[path[0]]
        return max(0.0, self._free_s[path[0]] - now_s) / cost, cost

    def collective_start(self, ranks: list[int], now_s: float) -> tuple[float, str]:
        """Earliest time from `now_s` on at which all `ranks` can reach each other; the reason if infinite."""
        if not (self._faults.cuts or self._faults.links):
            return now_s, ""
        start = now_s
        while True:
            later, a, b = max((self._faults.open_at(a, b, start), -a, -b) for a in ranks for b in ranks)
            if later == FOREVER:
                return later, self._faults.closed_for_ever(-a, -b, start)
            if later == start:
                return start, ""
            start = later

    def collective_s(self, operation: str, num_bytes: int, ranks: list[int], algorithm: str = "") -> float:
        """Seconds of one collective among `ranks`; `num_bytes` is the full per-rank buffer."""
        key = tuple(ranks)
        costs = self._costs.get(key)
        if costs is None:
            costs = self._costs[key] = CollectiveCosts(self.topology, ranks)
        return costs.seconds(operation, num_bytes, algorithm)

    def path(self, src: int, dst: int) -> list[int]:
        """Links from src to dst, in the order in which a message passes them; none to itself."""
        if src == dst:
            return []
        path = self._paths.get((src, dst))
        if path is None:
            links = self.topology.path(np.array([src]), np.array([dst]))[0]
            path = self._paths[src, dst] = _in_order([int(i) for i in links if i >= 0])
        return path


def _in_order(links: list[int]) -> list[int]:
    # A switched path lists both ports first, then the trunk; a message passes the receiving port last.
    return links if len(links) < 3 else [links[0], *links[2:], links[1]]
