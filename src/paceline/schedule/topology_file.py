"""A topology from JSON, as `Topology.to_json` wrote it or as a user changed it: every value is checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from paceline import user_input
from paceline.errors import ConfigError
from paceline.schedule.topology import KINDS, FloatArray, Graph, Grid, Switched, Topology

MAX_LINKS = 1 << 20
"""More links than these would not be simulated in reasonable time."""
_MAX_NODES = 4096


def read(path: str) -> Topology:
    """Read a topology file; ConfigError if it is something else."""
    return from_json(user_input.read_json(path, what="topology file"))


def from_json(value: object) -> Topology:
    """Rebuild what `Topology.to_json` gave; ConfigError if it is something else."""
    if not isinstance(value, Mapping) or value.get("paceline_topology") != 1:
        raise ConfigError(
            'topology JSON: an object with "paceline_topology": 1 expected; write it with to_json()'
        )
    fields = {k: v for k, v in value.items() if k != "paceline_topology"}
    name = fields.pop("kind", None)
    kind = KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise _wrong("kind", f"one of {', '.join(KINDS)}", name)
    known = {f.name: f for f in dataclasses.fields(kind) if f.init}
    for field in known.values():
        is_needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if is_needed and field.name not in fields:
            raise ConfigError(f"topology JSON: {field.name} is missing")
    made = kind(**{k: _value(k, v, known) for k, v in fields.items()})
    _check_links(made)
    return made


def _value(key: str, value: Any, known: Mapping[str, object]) -> Any:
    if key not in known:
        raise ConfigError(f"topology JSON: {key!r} is not a field; known: {', '.join(known)}")
    if key == "name":
        return _checked(key, value, "text", isinstance(value, str))
    if key == "hosts":
        is_fine = isinstance(value, list) and all(isinstance(h, str) for h in value)
        return tuple(_checked(key, value, "a list of names", is_fine))
    if key in ("link_latency_s", "link_seconds_per_byte"):
        return _expanded(key, value)
    if key == "rails":
        return _checked(key, value, "a whole number from 1 up", _is_whole(value, 1))
    if key in ("reduce_seconds_per_byte", "overhead_s"):
        return float(_checked(key, value, "a number of seconds from 0 up", _is_number(value)))
    least = 1 if key == "sides" else 0  # and group_of_host, link_src, link_dst
    is_fine = isinstance(value, list) and all(_is_whole(v, least) for v in value)
    return tuple(_checked(key, value, f"a list of whole numbers from {least} up", is_fine))


def _expanded(key: str, runs: Any) -> FloatArray:
    """Inverse of the run-length form [[value, times], …]."""
    is_fine = isinstance(runs, list) and all(
        isinstance(run, list) and len(run) == 2 and _is_number(run[0]) and _is_whole(run[1], 1)
        for run in runs
    )
    _checked(key, runs, "a list of [seconds, times]", is_fine)
    total = sum(run[1] for run in runs)
    if total > MAX_LINKS:
        raise _wrong(key, f"at most {MAX_LINKS} links", total)
    return np.repeat(
        np.array([run[0] for run in runs], dtype=np.float64),
        np.array([run[1] for run in runs], dtype=np.intp),
    )


def _check_links(made: Topology) -> None:
    """The arrays must have the lengths that the kind needs, or a path would leave them."""
    links, p, h = made.num_links, made.num_ranks, len(made.host_names)
    if len(made.link_seconds_per_byte) != links:
        raise _wrong("link_seconds_per_byte", f"{links} links", len(made.link_seconds_per_byte))
    if isinstance(made, Switched):
        if made.group_of_host and (len(made.group_of_host) != h or made.num_groups > h):
            raise _wrong("group_of_host", f"{h} groups below {h}", _short(made.group_of_host))
        expected = 2 * (p + h * made.rails + (made.num_groups if made.num_groups > 1 else 0))
    elif isinstance(made, Grid):
        if not made.sides or _product(made.sides) != p:
            raise _wrong("sides", f"a product of {p}, the number of hosts", _short(made.sides))
        expected = 2 * p * len(made.sides)
    else:
        assert isinstance(made, Graph)
        expected = len(made.link_src)
        if len(made.link_dst) != expected:
            raise _wrong("link_dst", f"{expected} ends", len(made.link_dst))
        if made.num_nodes > _MAX_NODES:
            raise _wrong("link_src, link_dst, hosts", f"nodes below {_MAX_NODES}", made.num_nodes)
    if links != expected:
        raise _wrong("link_latency_s", f"{expected} links", links)


def _product(values: Sequence[int]) -> int:
    product = 1
    for value in values:
        product *= value
        if product > MAX_LINKS:
            break
    return product


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= MAX_LINKS


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e300


def _checked(key: str, value: Any, expected: str, is_fine: bool) -> Any:
    if not is_fine:
        raise _wrong(key, expected, _short(value))
    return value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _wrong(key: str, expected: str, got: object) -> ConfigError:
    return ConfigError(f"topology JSON: {key}: {expected} expected, got {got}; write it with to_json()")
