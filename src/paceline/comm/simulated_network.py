"""The simulated network: how long a message or a collective takes on a Topology, in virtual seconds.

Networks are named as in `paceline.schedule.topology`: ethernet(gbit=1), cluster(hosts=8, local=4), …

A message passes the links between its ends one after the other, cut through: it occupies each for bytes ×
seconds_per_byte, and links serve in order of arrival. Messages of a worker to itself are free.
"""

from __future__ import annotations

import math

import numpy as np

from paceline.comm.faults import FOREVER, Faults
from paceline.schedule.topology import Topology

HEADER_BYTES = 128
"""Wire bytes of a message beside its tensors: our frame and the packets' own headers, roughly."""


class Network:
    """The links of a topology, and when each is free again."""

    header_bytes = HEADER_BYTES

    def __init__(self, topology: Topology, faults: Faults) -> None:
        self.topology = topology
        self._faults = faults
        self._latency_s = topology.link_latency_s.tolist()
        self._seconds_per_byte = topology.link_seconds_per_byte.tolist()
        self._free_s = [0.0] * topology.num_links
        self._paths: dict[tuple[int, int], list[int]] = {}
        self._costs: dict[tuple[str, int, int], float] = {}
        ranks = np.arange(topology.num_ranks)
        ring = topology.path(ranks, np.roll(ranks, -1)) if topology.num_ranks > 1 else None
        self._alpha_s = 0.0 if ring is None else float(topology.latency_s(ring).max())
        self._beta_s = 0.0 if ring is None else float(topology.seconds_per_byte(ring).max())

    @property
    def latency_s(self) -> float:
        """Largest latency between neighbours."""
        return self._alpha_s

    def send(self, src: int, dst: int, num_bytes: int, now_s: float) -> float:
        """Book the links for a message that leaves now; returns when it has arrived (infinite: never)."""
        if src == dst:
            return now_s
        first_byte_s = self._faults.open_at(src, dst, now_s)
        if first_byte_s == FOREVER:
            return FOREVER
        arrived_s = first_byte_s
        for link in self._path(src, dst):
            start_s = max(first_byte_s, self._free_s[link])
            self._free_s[link] = start_s + (num_bytes + HEADER_BYTES) * self._seconds_per_byte[link]
            first_byte_s = start_s + self._latency_s[link]
            arrived_s = max(arrived_s + self._latency_s[link], self._free_s[link] + self._latency_s[link])
        return arrived_s

    def backlog_bytes(self, src: int, dst: int, now_s: float) -> tuple[float, float]:
        """Bytes that wait at the first link from src to dst, and that link's seconds per byte."""
        path = self._path(src, dst) if src != dst else []
        if not path or not self._seconds_per_byte[path[0]]:
            return 0.0, 0.0
        cost = self._seconds_per_byte[path[0]]
        return max(0.0, self._free_s[path[0]] - now_s) / cost, cost

    def collective_start(self, ranks: list[int], now_s: float) -> float:
        """Earliest time from now on at which all of `ranks` can reach each other."""
        if not (self._faults.cuts or self._faults.links):
            return now_s
        start = now_s
        while True:
            later = max(self._faults.open_at(a, b, start) for a in ranks for b in ranks)
            if later == start:
                return start
            start = later

    def collective_s(self, operation: str, num_bytes: int, num_ranks: int) -> float:
        """Seconds of one collective; `num_bytes` is the full per-rank buffer. Cached."""
        key = (operation, num_bytes, num_ranks)
        if key not in self._costs:
            self._costs[key] = closed_form_s(operation, num_bytes, num_ranks, self._alpha_s, self._beta_s)
        return self._costs[key]

    def _path(self, src: int, dst: int) -> list[int]:
        path = self._paths.get((src, dst))
        if path is None:
            links = self.topology.path(np.array([src]), np.array([dst]))[0]
            path = self._paths[src, dst] = _in_order([int(i) for i in links if i >= 0])
        return path


def _in_order(links: list[int]) -> list[int]:
    # A switched path lists both ports first, then the trunk: the receiving port is passed last.
    return links if len(links) < 3 else [links[0], *links[2:], links[1]]


def closed_form_s(operation: str, num_bytes: int, num_ranks: int, alpha: float, beta: float) -> float:
    """Cost in seconds of the best textbook algorithm among ranks that each have their own port."""
    p, s_beta = num_ranks, num_bytes * beta
    if p <= 1:
        return 0.0
    log, share = math.floor(math.log2(p)), (p - 1) / p
    fold = 0 if p & (p - 1) == 0 else 1
    steps = log + fold
    if operation == "all_reduce":
        ring = 2 * (p - 1) * alpha + 2 * share * s_beta
        doubling = (log + 2 * fold) * (alpha + s_beta)
        halving = 2 * steps * alpha + (2 * share + 2 * fold) * s_beta
        return min(ring, doubling, halving)
    if operation in ("all_gather", "reduce_scatter"):
        return (steps if not fold else p - 1) * alpha + share * s_beta
    if operation in ("all_to_all", "gather", "scatter"):
        return (p - 1 if operation == "all_to_all" else steps) * alpha + share * s_beta
    if operation == "barrier":
        return steps * alpha
    # broadcast, reduce: a tree of whole messages, or scatter and all-gather for long ones
    return min(steps * (alpha + s_beta), (steps + p - 1) * alpha + 2 * share * s_beta)
