"""How ranks are grouped by host, for the algorithms that know hosts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from paceline.errors import ConfigError
from paceline.schedule.cost import No
from paceline.schedule.program import IntArray, Step, chunk_offsets

VARIANTS: tuple[dict[str, int], ...] = ({}, {"hosts": 2}, {"hosts": 3})
"""Host options that the sweep tries: as square as possible, and 2 and 3 hosts, often of unequal sizes."""

Hosts: TypeAlias = Sequence[str] | Sequence[int] | int | None
"""Each rank's host, a name or a number, shape (P,); or the number of hosts that share the ranks evenly;
or None: as square as P allows, with the largest divisor of P up to √P as number of hosts."""


def members(num_ranks: int, hosts: Hosts) -> list[IntArray]:
    """Ranks of each host, in the order of the hosts' first ranks; ConfigError if `hosts` does not fit."""
    if hosts is None:
        hosts = next(m for m in range(math.isqrt(num_ranks), 0, -1) if num_ranks % m == 0)
    if isinstance(hosts, int):
        if not 1 <= hosts <= num_ranks:
            raise ConfigError(f"{num_ranks} ranks on {hosts} hosts: 1 to {num_ranks} hosts expected")
        cuts = chunk_offsets(num_ranks, hosts)
        return [np.arange(a, b, dtype=np.intp) for a, b in itertools.pairwise(cuts)]
    if not isinstance(hosts, Sequence):
        raise ConfigError(f"hosts: a number of hosts, or one host per rank expected, got {hosts}")
    if len(hosts) != num_ranks:
        raise ConfigError(f"one host per rank expected: {num_ranks} ranks, {len(hosts)} hosts given")
    of = np.array([str(h) for h in hosts])
    return [np.flatnonzero(of == name).astype(np.intp) for name in dict.fromkeys(of.tolist())]


def fits(num_ranks: int, hosts: Hosts) -> bool | No:
    """Whether `hosts` describes `num_ranks` ranks."""
    try:
        return bool(members(num_ranks, hosts))
    except ConfigError as error:
        return No(error)


def embed(step: Step, groups: IntArray, *, chunk: IntArray, scale: int = 1) -> Step:
    """Run `step`, written for n ranks, in every one of G groups of n ranks at once.

    `groups`: real rank of each member, shape (G, n). Chunk c becomes the `scale` chunks from
    `chunk[g]` + c·scale on; both buffers alike.
    """
    g, t = len(groups), len(step)

    def tile(column: IntArray) -> IntArray:
        return np.tile(column, g)

    first = np.repeat(np.asarray(chunk, dtype=np.intp), t)
    return Step(
        tile(step.kind),
        groups[:, step.src_rank].ravel(),
        tile(step.src_buffer),
        first + tile(step.src_chunk) * scale,
        groups[:, step.dst_rank].ravel(),
        tile(step.dst_buffer),
        first + tile(step.dst_chunk) * scale,
        tile(step.count) * scale,
        tile(step.channel),
    )
