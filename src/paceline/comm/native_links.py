"""How fast each rank's link is, and how to divide an all_reduce among links of different speeds.

When all ranks talk to each other directly, rank i sends its contributions to the parts that others own, and
the results of its own part to everybody: S (1 + (P-2) w_i) bytes if it owns the share w_i of S. These shares
make the slowest link's time as short as it can be; a link that is much slower than the others owns nothing,
sends S and receives S, where a ring would need 2 (P-1)/P S of it.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from paceline.types import ReduceOp

if TYPE_CHECKING:
    from paceline.comm.communicator import FabricCommunicator

_PROBE_BYTES = 1 << 20
_EVEN = 1.6
"""Links that differ by less are taken as equal: measuring is no more exact."""


def measure(comm: FabricCommunicator) -> list[float]:
    """Bytes/s of every rank's link, the same list on all ranks. Collective; moves 2 MiB per rank.

    Everybody streams to the next rank at once, twice; the slower end decides, and the faster pair counts.
    """
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    out, into = torch.zeros(_PROBE_BYTES, dtype=torch.uint8), torch.empty(_PROBE_BYTES, dtype=torch.uint8)
    best_s = float("inf")
    for _ in range(2):
        comm.barrier().wait()
        start = time.perf_counter()
        sent = comm.send(out, right)
        comm.recv(into, left).wait()
        best_s = min(best_s, time.perf_counter() - start)
        sent.wait()
    pairs = torch.zeros(comm.size, dtype=torch.float64)
    pairs[comm.rank] = _PROBE_BYTES / best_s  # of the link pair (left, this rank)
    comm.all_reduce(pairs, op=ReduceOp.SUM).wait()
    rates: list[float] = pairs.tolist()
    return [max(rate, rates[(r + 1) % comm.size]) for r, rate in enumerate(rates)]


def shares(rates: Sequence[float]) -> list[float] | None:
    """The share of the buffer that each rank should own; None if even shares will do."""
    p = len(rates)
    if p < 3 or max(rates) < _EVEN * min(rates):
        return None
    low, high = 0.0, p * p / min(rates)  # of the time per byte; more time, larger shares
    for _ in range(60):
        middle = (low + high) / 2
        if sum(max(0.0, (middle * rate - 1) / (p - 2)) for rate in rates) < 1:
            low = middle
        else:
            high = middle
    found = [max(0.0, (high * rate - 1) / (p - 2)) for rate in rates]
    return [share / sum(found) for share in found]


def counts(numel: int, parts: Sequence[float], *, multiple: int) -> list[int]:
    """`numel` elements divided by shares, each part but the last a multiple of `multiple`."""
    edges, total = [0], 0.0
    for share in parts[:-1]:
        total += share
        edges.append(min(numel, round(numel * total / multiple) * multiple))
    edges.append(numel)
    return [b - a for a, b in itertools.pairwise(edges)]
