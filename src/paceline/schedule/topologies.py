"""Named topologies, and how to write one on a line.

    ethernet(gbit=1)                       one rank per host, one NIC each, a switch that never limits
    cluster(hosts=4, local=2, gbit=10)     several ranks per host share its NICs (rails) and its memory
    dumbbell(gbit=1, trunk_gbit=1)         two switches joined by one trunk
    shared_memory                          all ranks on one host
    ring, torus(rows=4, columns=4), hypercube, fully_connected, dgx1, random(seed=7)
    lab.json                               what `to_json` of a topology wrote

`parse(text, num_ranks=P)`: the number of ranks follows from the arguments of the spec if they give it, else
it is `num_ranks`. Every factory takes `gbit` (10⁹ bits per second and direction), `latency_us` (one way, one
message) and `reduce_gbyte` (10⁹ bytes per second that one rank combines); ethernet and cluster also
`message_us`, the time that each message keeps its ports busy beyond its bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from paceline import spec as specs
from paceline.errors import ConfigError
from paceline.registry import unknown
from paceline.schedule import topology_file
from paceline.schedule.topology import FloatArray, Graph, Grid, Switched, Topology
from paceline.schedule.topology_file import from_json

__all__ = ["NAMED", "Graph", "Grid", "Switched", "Topology", "from_json", "parse"]

_REDUCE_GBYTE = 10.0
_MAX_GRAPH_RANKS = 512
_MAX_RANKS = 1 << 17

DEFAULT = "ethernet(gbit=10)"
"""The network that tools assume when the user names none."""


def ethernet(
    *,
    ranks: int,
    gbit: float = 10.0,
    latency_us: float = 50.0,
    message_us: float = 0.0,
    reduce_gbyte: float = _REDUCE_GBYTE,
) -> Switched:
    """One rank per host, one NIC each: the one-port model."""
    return cluster(
        hosts=ranks,
        local=1,
        gbit=gbit,
        latency_us=latency_us,
        message_us=message_us,
        reduce_gbyte=reduce_gbyte,
    )


def shared_memory(
    *, ranks: int, gbyte: float = 10.0, latency_us: float = 1.0, reduce_gbyte: float = _REDUCE_GBYTE
) -> Switched:
    """All ranks on one host; `gbyte`: 10⁹ bytes per second that one rank copies to another."""
    return cluster(
        hosts=1, local=ranks, local_gbyte=gbyte, local_latency_us=latency_us, reduce_gbyte=reduce_gbyte
    )


def cluster(
    *,
    hosts: int,
    local: int = 2,
    gbit: float = 10.0,
    latency_us: float = 50.0,
    message_us: float = 0.0,
    local_gbyte: float = 10.0,
    local_latency_us: float = 1.0,
    rails: int = 1,
    reduce_gbyte: float = _REDUCE_GBYTE,
) -> Switched:
    """`hosts` hosts of `local` ranks; each host has `rails` NICs of `gbit` each, shared by its ranks."""
    _positive(hosts=hosts, local=local, rails=rails)
    name = f"ethernet(gbit={gbit:g})" if local == 1 else f"cluster(hosts={hosts}, local={local})"
    if hosts == 1:
        name = "shared_memory"
    return switched(
        name,
        [f"host{h}" for h in range(hosts) for _ in range(local)],
        nic_latency_s=latency_us * 1e-6,
        nic_seconds_per_byte=_per_byte_of_gbit(gbit),
        local_latency_s=local_latency_us * 1e-6,
        local_seconds_per_byte=_per_byte_of_gbyte(local_gbyte),
        rails=rails,
        reduce_seconds_per_byte=_per_byte_of_gbyte(reduce_gbyte),
        overhead_s=message_us * 1e-6,
    )


def dumbbell(
    *,
    ranks: int,
    gbit: float = 10.0,
    trunk_gbit: float = 10.0,
    latency_us: float = 50.0,
    trunk_latency_us: float = 50.0,
    reduce_gbyte: float = _REDUCE_GBYTE,
) -> Switched:
    """Two switches with half of the hosts each, joined by one trunk that all traffic between them shares."""
    _positive(ranks=ranks)
    half = (ranks + 1) // 2
    return switched(
        f"dumbbell(ranks={ranks})",
        [f"host{h}" for h in range(ranks)],
        nic_latency_s=latency_us * 1e-6,
        nic_seconds_per_byte=_per_byte_of_gbit(gbit),
        reduce_seconds_per_byte=_per_byte_of_gbyte(reduce_gbyte),
        group_of_host=[int(h >= half) for h in range(ranks)] if ranks > 1 else (),
        trunk_latency_s=trunk_latency_us * 1e-6,
        trunk_seconds_per_byte=_per_byte_of_gbit(trunk_gbit),
    )


def switched(
    name: str,
    hosts: Sequence[str],
    *,
    nic_latency_s: float | Sequence[float],
    nic_seconds_per_byte: float | Sequence[float],
    local_latency_s: float | Sequence[float] = 1e-6,
    local_seconds_per_byte: float | Sequence[float] = 1e-10,
    rails: int = 1,
    reduce_seconds_per_byte: float = 1e-10,
    group_of_host: Sequence[int] = (),
    trunk_latency_s: float = 0.0,
    trunk_seconds_per_byte: float = 0.0,
    overhead_s: float = 0.0,
) -> Switched:
    """Hosts behind switches, from measured values.

    `hosts`: the host of every rank, shape (P,). NIC values: one for all, or one per host in the order of the
    hosts' first ranks; local ones: one for all, or one per rank. A message between hosts takes half the
    latency of each of the two NICs.
    """
    p, names = len(hosts), tuple(dict.fromkeys(hosts))

    def every(values: float | Sequence[float], count: int, what: str) -> FloatArray:
        array = np.asarray(values, dtype=np.float64)
        if array.ndim and len(array) != count:
            raise ConfigError(f"topology {name}: {what}: one value or {count} expected, got {len(array)}")
        return np.broadcast_to(array, (count,))

    nic_l = np.repeat(every(nic_latency_s, len(names), "nic_latency_s"), rails) / 2
    nic_b = np.repeat(every(nic_seconds_per_byte, len(names), "nic_seconds_per_byte"), rails)
    local_l = every(local_latency_s, p, "local_latency_s") / 2
    local_b = every(local_seconds_per_byte, p, "local_seconds_per_byte")
    groups = max(group_of_host, default=0) + 1
    trunks = groups if groups > 1 else 0
    latency = [local_l, local_l, nic_l, nic_l, np.full(2 * trunks, trunk_latency_s / 2)]
    cost = [local_b, local_b, nic_b, nic_b, np.full(2 * trunks, trunk_seconds_per_byte)]
    return Switched(
        name,
        tuple(hosts),
        np.concatenate(latency),
        np.concatenate(cost),
        reduce_seconds_per_byte,
        overhead_s,
        rails,
        tuple(group_of_host),
    )


def torus(
    *,
    rows: int,
    columns: int,
    gbit: float = 100.0,
    latency_us: float = 5.0,
    reduce_gbyte: float = _REDUCE_GBYTE,
) -> Grid:
    """2-D torus: every rank has links to four neighbours, all usable at once."""
    _positive(rows=rows, columns=columns)
    return _grid(f"torus(rows={rows}, columns={columns})", (rows, columns), gbit, latency_us, reduce_gbyte)


def ring(
    *, ranks: int, gbit: float = 100.0, latency_us: float = 5.0, reduce_gbyte: float = _REDUCE_GBYTE
) -> Grid:
    """Every rank has a link to each of its two neighbours, both usable at once."""
    _positive(ranks=ranks)
    return _grid(f"ring(ranks={ranks})", (ranks,), gbit, latency_us, reduce_gbyte)


def hypercube(
    *, ranks: int, gbit: float = 100.0, latency_us: float = 5.0, reduce_gbyte: float = _REDUCE_GBYTE
) -> Grid:
    """lg P links per rank: to every rank whose number differs in one bit."""
    _positive(ranks=ranks)
    if ranks & (ranks - 1):
        raise ConfigError(f"hypercube: a power of two of ranks expected, got {ranks}")
    sides = (2,) * max(ranks.bit_length() - 1, 1) if ranks > 1 else (1,)
    return _grid(f"hypercube(ranks={ranks})", sides, gbit, latency_us, reduce_gbyte)


def fully_connected(
    *, ranks: int, gbit: float = 100.0, latency_us: float = 5.0, reduce_gbyte: float = _REDUCE_GBYTE
) -> Graph:
    """A link of its own from every rank to every other, all usable at once."""
    _few(ranks, "fully_connected")
    pairs = [(a, b) for a in range(ranks) for b in range(ranks) if a != b]
    each = {pair: (latency_us * 1e-6, _per_byte_of_gbit(gbit)) for pair in pairs}
    return graph(f"fully_connected(ranks={ranks})", ranks, each, reduce_gbyte=reduce_gbyte)


def dgx1(*, gbyte: float = 25.0, latency_us: float = 2.0, reduce_gbyte: float = 500.0) -> Graph:
    """Eight GPUs with six NVLinks each (the 2017 machine with V100s); doubled links cost half per byte."""
    single = [(0, 1), (0, 2), (1, 3), (2, 6), (3, 7), (4, 5), (4, 6), (5, 7)]
    double = [(0, 3), (0, 4), (1, 2), (1, 5), (2, 3), (4, 7), (5, 6), (6, 7)]
    cost = _per_byte_of_gbyte(gbyte)
    links = dict.fromkeys(single, (latency_us * 1e-06, cost))
    links |= dict.fromkeys(double, (latency_us * 1e-06, cost / 2))
    links |= {(b, a): link for (a, b), link in links.items()}
    return graph("dgx1", 8, links, hosts=["dgx1"] * 8, reduce_gbyte=reduce_gbyte)


def random(
    *, ranks: int, seed: int = 0, gbit: float = 10.0, spread: float = 8.0, latency_us: float = 50.0
) -> Graph:
    """A link between every two ranks; cost and latency log-uniform within a factor `spread`, from `seed`."""
    _few(ranks, "random")
    if spread < 1:
        raise ConfigError(f"random: spread of at least 1 expected, got {spread}")
    generator = np.random.default_rng(seed)
    pairs = [(a, b) for a in range(ranks) for b in range(ranks) if a != b]
    factors = np.exp((generator.random((len(pairs), 2)) - 0.5) * math.log(spread)).tolist()
    cost = _per_byte_of_gbit(gbit)
    links = {pair: (latency_us * 1e-6 * f, cost * g) for pair, (f, g) in zip(pairs, factors, strict=True)}
    return graph(f"random(ranks={ranks}, seed={seed})", ranks, links)


def graph(
    name: str,
    num_ranks: int,
    links: Mapping[tuple[int, int], tuple[float, float]],
    *,
    hosts: Sequence[str] | None = None,
    reduce_gbyte: float = _REDUCE_GBYTE,
) -> Graph:
    """Topology of explicit directed links: (src, dst) → (latency_s, seconds_per_byte)."""
    values = np.array(list(links.values()), dtype=np.float64).reshape(-1, 2)
    return Graph(
        name,
        tuple(hosts or (f"host{r}" for r in range(num_ranks))),
        values[:, 0].copy(),
        values[:, 1].copy(),
        _per_byte_of_gbyte(reduce_gbyte),
        link_src=tuple(a for a, _ in links),
        link_dst=tuple(b for _, b in links),
    )


NAMED: dict[str, Callable[..., Topology]] = {
    f.__name__: f
    for f in (
        cluster,
        dgx1,
        dumbbell,
        ethernet,
        fully_connected,
        hypercube,
        random,
        ring,
        shared_memory,
        torus,
    )
}
"""Every named topology by its name in specs."""


def parse(text: str, *, num_ranks: int | None = None) -> Topology:
    """Make a topology from a spec string, or from a JSON file.

    `num_ranks` fills in what the spec leaves open, and must agree with what it says. ConfigError otherwise.
    """
    if text.endswith(".json"):
        made = topology_file.read(text)
    else:
        wanted = specs.parse(text)
        if wanted.name not in NAMED:
            raise ConfigError(unknown("topology", wanted.name, NAMED))
        arguments = _sized(wanted.name, dict(wanted.arguments), num_ranks)
        made = specs.call(NAMED[wanted.name], specs.Spec(wanted.name, arguments), kind="topology")
    if num_ranks is not None and made.num_ranks != num_ranks:
        raise ConfigError(f"topology {text} has {made.num_ranks} ranks, but {num_ranks} are wanted")
    return made


def _sized(name: str, arguments: dict[str, Any], num_ranks: int | None) -> dict[str, Any]:
    """Fill in the size that the spec leaves open."""
    if num_ranks is None:
        return arguments
    if name == "cluster" and "hosts" not in arguments:
        local = arguments.setdefault("local", 2)
        if not isinstance(local, int) or local < 1 or num_ranks % local:
            raise ConfigError(f"cluster(local={local}): {num_ranks} ranks do not fill hosts of {local}")
        arguments["hosts"] = num_ranks // local
    elif name == "torus":
        if "columns" not in arguments and "rows" not in arguments:
            arguments["rows"] = max(d for d in range(1, math.isqrt(num_ranks) + 1) if num_ranks % d == 0)
        if "rows" in arguments and "columns" not in arguments:
            rows = specs.whole_number("torus: rows", arguments["rows"], least=1)
            arguments["columns"] = max(num_ranks // rows, 1)
        elif "columns" in arguments and "rows" not in arguments:
            columns = specs.whole_number("torus: columns", arguments["columns"], least=1)
            arguments["rows"] = max(num_ranks // columns, 1)
    elif name not in ("cluster", "dgx1"):
        arguments.setdefault("ranks", num_ranks)
    return arguments


def _positive(**values: int) -> None:
    """Whole numbers from 1 up, whose product (ranks, with their rails) can be simulated."""
    for key, value in values.items():
        specs.whole_number(key, value, least=1)
    if math.prod(values.values()) > _MAX_RANKS:
        given = " × ".join(f"{key}={value}" for key, value in values.items())
        raise ConfigError(f"topology: at most {_MAX_RANKS} ranks expected, got {given}")


def _few(ranks: int, name: str) -> None:
    _positive(ranks=ranks)
    if ranks > _MAX_GRAPH_RANKS:
        raise ConfigError(
            f"{name}: at most {_MAX_GRAPH_RANKS} ranks ({ranks}² links would not fit); use ethernet or torus"
        )


def _per_byte_of_gbit(gbit: float) -> float:
    if not gbit > 0:
        raise ConfigError(f"gbit: more than 0 expected, got {gbit}")
    return 8e-9 / gbit


def _per_byte_of_gbyte(gbyte: float) -> float:
    if not gbyte > 0:
        raise ConfigError(f"a rate in 10⁹ bytes per second: more than 0 expected, got {gbyte}")
    return 1e-9 / gbyte


def _grid(name: str, sides: tuple[int, ...], gbit: float, latency_us: float, reduce_gbyte: float) -> Grid:
    links = 2 * len(sides) * math.prod(sides)
    if links > topology_file.MAX_LINKS:
        raise ConfigError(f"{name}: at most {topology_file.MAX_LINKS} links expected, got {links}")
    return Grid(
        name,
        tuple(f"host{r}" for r in range(math.prod(sides))),
        np.full(links, latency_us * 1e-6),
        np.full(links, _per_byte_of_gbit(gbit)),
        _per_byte_of_gbyte(reduce_gbyte),
        sides=sides,
    )
