"""What a Topology is, and its three kinds: hosts behind switches, grids, and explicit graphs.

A topology is ranks on hosts and directed links. A link has a latency (s) and a cost (s per byte), and carries
the bytes of all transfers that pass it. Ports are links too: a rank's NIC is one link out and one link in,
so "one port, full duplex" and "L ranks behind one NIC" are shared links like any other.

    Switched   hosts with NICs (rails) on a switch; ranks of one host talk through its memory
    Grid       torus of any number of dimensions (ring, 2-D torus, hypercube); every link works at once
    Graph      links given one by one (DGX-1, random); shortest paths where there is no direct link

`path` gives the links of many transfers at once, so that thousands of ranks are one array operation.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias, final

import numpy as np
import numpy.typing as npt

from paceline.errors import ConfigError

IntArray: TypeAlias = npt.NDArray[np.intp]
FloatArray: TypeAlias = npt.NDArray[np.float64]

NONE = -1
"""Marks "no link" in a path."""
_MAX_PATH_ENTRIES = 1 << 26
_TYPICAL_BYTES = 1 << 20


@dataclass(frozen=True, eq=False)
class Topology(ABC):
    """P ranks on hosts, joined by directed links. Read only.

    `hosts`: the host of every rank, length P. `link_latency_s`, `link_seconds_per_byte`: shape (links,).
    `reduce_seconds_per_byte`: time of a rank to combine a received byte with its own. `overhead_s`: how long
    each message keeps every link of its path busy beyond its bytes (system calls, headers). It makes many
    small messages of one step more expensive than one large message, which latency alone does not.
    """

    name: str
    hosts: tuple[str, ...]
    link_latency_s: FloatArray = field(repr=False)
    link_seconds_per_byte: FloatArray = field(repr=False)
    reduce_seconds_per_byte: float = 0.0
    overhead_s: float = 0.0

    def __post_init__(self) -> None:
        if not self.hosts:
            raise ConfigError(f"topology {self.name}: at least one rank expected")
        for what, values in (
            ("link latency", self.link_latency_s),
            ("link seconds per byte", self.link_seconds_per_byte),
            ("reduce_seconds_per_byte", np.array([self.reduce_seconds_per_byte])),
            ("overhead_s", np.array([self.overhead_s])),
        ):
            if values.size and not (np.isfinite(values).all() and values.min() >= 0):
                raise ConfigError(f"topology {self.name}: {what} must be finite and not negative")
            values.flags.writeable = False

    @property
    def num_ranks(self) -> int:
        """P, the number of ranks."""
        return len(self.hosts)

    @property
    def num_links(self) -> int:
        """How many directed links there are, ports included."""
        return len(self.link_latency_s)

    @cached_property
    def host_names(self) -> tuple[str, ...]:
        """Every host once, in the order of its first rank."""
        return tuple(dict.fromkeys(self.hosts))

    @cached_property
    def host_of(self) -> IntArray:
        """Host number of every rank, shape (P,): an index into `host_names`."""
        number = {h: i for i, h in enumerate(self.host_names)}
        return np.array([number[h] for h in self.hosts], dtype=np.intp)

    @cached_property
    def local_index(self) -> IntArray:
        """How many ranks of the same host come before this one, shape (P,)."""
        order = np.argsort(self.host_of, kind="stable")
        counts = np.bincount(self.host_of)
        first = np.repeat(np.cumsum(counts) - counts, counts)
        index = np.empty(self.num_ranks, dtype=np.intp)
        index[order] = np.arange(self.num_ranks) - first
        return index

    @abstractmethod
    def path(self, src: IntArray, dst: IntArray, channel: IntArray | int = 0) -> IntArray:
        """Links that n transfers pass: shape (n, hops), padded with NONE, which is all where src is dst."""

    @abstractmethod
    def ends(self) -> tuple[IntArray, IntArray]:
        """Nodes that every link leaves and reaches, shape (links,) each; nodes 0 … P−1 are the ranks."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Plain values from which `topology.from_json` makes the same topology."""

    def uniform(self) -> tuple[float, float] | None:
        """(latency_s, seconds_per_byte) if every rank has one port of its own and all pairs are alike."""
        return None

    def latency_s(self, path: IntArray) -> FloatArray:
        """Sum of the links' latencies, shape (n,)."""
        return np.asarray(np.append(self.link_latency_s, 0.0)[path].sum(axis=1), dtype=np.float64)

    def seconds_per_byte(self, path: IntArray) -> FloatArray:
        """The slowest link's cost, shape (n,); 0 for a path without links."""
        costs = np.append(self.link_seconds_per_byte, 0.0)[path]
        return np.asarray(costs.max(axis=1, initial=0.0), dtype=np.float64)

    def __str__(self) -> str:
        return f"{self.name} ({self.num_ranks} ranks on {len(self.host_names)} hosts)"


@final
@dataclass(frozen=True, eq=False)
class Switched(Topology):
    """Hosts with `rails` NICs each on one switch, or on several joined by trunks.

    Links: rank → host memory (P), memory → rank (P), NIC out (hosts × rails), NIC in (hosts × rails), switch
    out (groups), switch in (groups). `group_of_host` says on which switch a host is. A rank uses rail (its
    number on the host + channel) mod rails at both ends.
    """

    rails: int = 1
    group_of_host: tuple[int, ...] = ()

    def path(self, src: IntArray, dst: IntArray, channel: IntArray | int = 0) -> IntArray:
        """Memory within a host; NIC, perhaps trunk, NIC between hosts."""
        p, h, r = self.num_ranks, len(self.host_names), self.rails
        a, b = self.host_of[src], self.host_of[dst]
        local = a == b
        rail = 0 if r == 1 else (self.local_index[src] + channel) % r
        nics = 2 * p
        out = np.where(local, src, nics + a * r + rail)
        into = np.where(local, p + dst, nics + h * r + b * r + rail)
        columns = [out, into]
        if self.num_groups > 1:
            group, trunks = np.asarray(self.group_of_host), nics + 2 * h * r
            ga, gb = group[a], group[b]
            columns.append(np.where(ga == gb, NONE, trunks + ga))
            columns.append(np.where(ga == gb, NONE, trunks + self.num_groups + gb))
        links = np.stack(columns, axis=1)
        links[np.asarray(src) == dst] = NONE
        return links

    @property
    def num_groups(self) -> int:
        """Number of switches that hosts are on."""
        return max(self.group_of_host, default=0) + 1

    def ends(self) -> tuple[IntArray, IntArray]:
        """Nodes: ranks, one memory per host, NICs (as part of the ranks' host), switches."""
        p, h, r, g = self.num_ranks, len(self.host_names), self.rails, self.num_groups
        memory, switch = p + self.host_of, p + h
        nic = np.repeat(p + np.arange(h), r)
        group = switch + np.asarray(self.group_of_host or (0,) * h, dtype=np.intp)
        on = np.repeat(group, r)
        ranks = np.arange(p)
        src, dst = [ranks, memory, nic, on], [memory, ranks, on, nic]
        if g > 1:
            core = np.full(g, switch + g)
            src += [switch + np.arange(g), core]
            dst += [core, switch + np.arange(g)]
        return np.concatenate(src), np.concatenate(dst)

    def uniform(self) -> tuple[float, float] | None:
        """One rank per host and equal NICs, or one host with equal ranks."""
        p, h = self.num_ranks, len(self.host_names)
        if p == 1 or self.rails > 1 or self.num_groups > 1 or h not in (1, p) or self.overhead_s:
            return None
        used = slice(2 * p) if h == 1 else slice(2 * p, 2 * p + 2 * h)
        latency, cost = self.link_latency_s[used].reshape(2, p), self.link_seconds_per_byte[used]
        if np.ptp(latency, axis=1).any() or np.ptp(cost):
            return None
        return float(latency[0, 0] + latency[1, 0]), float(cost[0])

    def to_json(self) -> dict[str, Any]:
        extra = {"rails": self.rails, "group_of_host": list(self.group_of_host)}
        return {**_json_base(self, "switched"), **extra}


@final
@dataclass(frozen=True, eq=False)
class Grid(Topology):
    """Torus of any number of dimensions: rank = its coordinates in row-major order, links to ± neighbours.

    Link (rank·dims + dim)·2 + direction, 0 up and 1 down. Messages go along dimension 0 first, then 1, …, the
    shorter way round (up on a tie). Every link works at the same time: no port limit.
    """

    sides: tuple[int, ...] = ()

    def path(self, src: IntArray, dst: IntArray, channel: IntArray | int = 0) -> IntArray:
        """Route along dimension 0 first, then 1, …"""
        sides = self.sides
        src, dst = np.asarray(src, dtype=np.intp), np.asarray(dst, dtype=np.intp)
        at = list(np.unravel_index(src, sides))
        to = np.unravel_index(dst, sides)
        moves = []
        for d, side in enumerate(sides):
            up = (to[d] - at[d]) % side
            moves.append(np.where(up <= side - up, up, up - side))
        hops = int(sum(np.abs(m) for m in moves).max(initial=0))  # type: ignore[union-attr]
        if hops * len(src) > _MAX_PATH_ENTRIES:
            raise ConfigError(
                f"{self.name}: {len(src)} messages over up to {hops} hops are too many to route; "
                "use an algorithm for neighbours (ring) or a smaller network"
            )
        links = np.full((len(src), max(hops, 1)), NONE, dtype=np.intp)
        column = np.zeros(len(src), dtype=np.intp)
        for d, move in enumerate(moves):
            for k in range(int(np.abs(move).max(initial=0))):
                go = np.flatnonzero(np.abs(move) > k)
                here = np.ravel_multi_index(tuple(c[go] for c in at), sides)
                down = (move[go] < 0).astype(np.intp)
                links[go, column[go]] = (here * len(sides) + d) * 2 + down
                column[go] += 1
                at[d][go] = (at[d][go] + 1 - 2 * down) % sides[d]
        return links

    def ends(self) -> tuple[IntArray, IntArray]:
        """From rank to neighbour.

        A link along a side of 1, or down a side of 2, does not exist: it has a number, and src = dst.
        """
        p, k = self.num_ranks, len(self.sides)
        rank, dim, down = (a.ravel() for a in np.indices((p, k, 2)))
        at = np.array(np.unravel_index(rank, self.sides))
        sides = np.asarray(self.sides)[dim]
        real = (sides > 2) | ((sides == 2) & (down == 0))
        at[dim, np.arange(len(rank))] += np.where(real, 1 - 2 * down, 0)
        at %= np.asarray(self.sides)[:, None]
        return rank, np.ravel_multi_index(tuple(at), self.sides)

    def to_json(self) -> dict[str, Any]:
        return {**_json_base(self, "grid"), "sides": list(self.sides)}


@final
@dataclass(frozen=True, eq=False)
class Graph(Topology):
    """Links given one by one; nodes beyond the ranks are switches. No port limit: every link works at once.

    A message takes the direct link if there is one, else the path that is fastest for 1 MiB.
    """

    link_src: tuple[int, ...] = ()
    link_dst: tuple[int, ...] = ()
    _trees: dict[int, list[int]] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def num_nodes(self) -> int:
        """Number of ranks and switches."""
        return max((self.num_ranks - 1, *self.link_src, *self.link_dst)) + 1

    @cached_property
    def _direct(self) -> IntArray:
        table = np.full(self.num_nodes**2, NONE, dtype=np.intp)
        src, dst = self.ends()
        table[src * self.num_nodes + dst] = np.arange(self.num_links)
        return table

    def path(self, src: IntArray, dst: IntArray, channel: IntArray | int = 0) -> IntArray:
        """Direct link, or shortest path."""
        src, dst = np.asarray(src, dtype=np.intp), np.asarray(dst, dtype=np.intp)
        links = self._direct[src * self.num_nodes + dst][:, None]
        missing = np.flatnonzero((links[:, 0] == NONE) & (src != dst))
        routes = {int(i): self._route(int(src[i]), int(dst[i])) for i in missing}
        wide = np.full((len(src), max((1, *map(len, routes.values())))), NONE, dtype=np.intp)
        wide[:, :1] = links
        for i, route in routes.items():
            wide[i, : len(route)] = route
        return wide

    def ends(self) -> tuple[IntArray, IntArray]:
        return np.asarray(self.link_src, dtype=np.intp), np.asarray(self.link_dst, dtype=np.intp)

    def _route(self, src: int, dst: int) -> list[int]:
        if src not in self._trees:
            self._trees[src] = self._shortest_from(src)
        route, node = [], dst
        while node != src:
            link = self._trees[src][node]
            if link == NONE:
                raise ConfigError(f"{self.name}: no path from rank {src} to rank {dst}; add links")
            route.append(link)
            node = self.link_src[link]
        return route[::-1]

    @cached_property
    def _leaving(self) -> list[list[int]]:
        links: list[list[int]] = [[] for _ in range(self.num_nodes)]
        for link, node in enumerate(self.link_src):
            links[node].append(link)
        return links

    def _shortest_from(self, src: int) -> list[int]:
        """Last link on the fastest path from `src` to every node (Dijkstra)."""
        cost = self.link_latency_s + _TYPICAL_BYTES * self.link_seconds_per_byte
        best, last = [np.inf] * self.num_nodes, [NONE] * self.num_nodes
        best[src], queue = 0.0, [(0.0, src)]
        while queue:
            distance, node = heapq.heappop(queue)
            if distance > best[node]:
                continue
            for link in self._leaving[node]:
                to, reach = self.link_dst[link], distance + float(cost[link])
                if reach < best[to]:
                    best[to], last[to] = reach, link
                    heapq.heappush(queue, (reach, to))
        return last

    def to_json(self) -> dict[str, Any]:
        extra = {"link_src": list(self.link_src), "link_dst": list(self.link_dst)}
        return {**_json_base(self, "graph"), **extra}


KINDS: dict[str, type[Topology]] = {"switched": Switched, "grid": Grid, "graph": Graph}


def _json_base(topology: Topology, kind: str) -> dict[str, Any]:
    return {
        "paceline_topology": 1,
        "kind": kind,
        "name": topology.name,
        "hosts": list(topology.hosts),
        "link_latency_s": _compact(topology.link_latency_s),
        "link_seconds_per_byte": _compact(topology.link_seconds_per_byte),
        "reduce_seconds_per_byte": topology.reduce_seconds_per_byte,
        "overhead_s": topology.overhead_s,
    }


def _compact(values: FloatArray) -> list[list[float]]:
    """Run-length: [[value, times], …]; the links of large networks are mostly alike."""
    if not len(values):
        return []
    cuts = np.flatnonzero(np.diff(values)) + 1
    starts = np.concatenate([[0], cuts])
    lengths = np.diff(np.append(starts, len(values)))
    return [[float(values[s]), int(n)] for s, n in zip(starts, lengths, strict=True)]
