"""Shares of a large all_reduce for links of different speeds.

When all ranks talk to each other directly, rank r sends its contributions to the shares that others reduce,
and the results of its own share w_r to all others: S (1 + (P-2) w_r) bytes, and receives as many. The shares
of `best` make the slowest link's time as short as it can be. A rank whose link is much slower than the others
reduces nothing: the link carries S in each direction, which no schedule undercuts; a ring takes 2 (P-1)/P S.

`direct(shares=33/33/34/0)` is such an algorithm: the weights of the ranks, in their order.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence

from paceline import spec
from paceline.comm.native.choice import DIRECT
from paceline.errors import ConfigError
from paceline.schedule.program import INPUT, Program, Step, copy, reduce, together
from paceline.spec import Spec

SMALLEST_BYTES = 256 << 10
"""Below, latency counts for more than bandwidth."""
_EVEN = 1.5
"""Links that differ by less are taken as equal: measuring is not more exact."""
_ROUNDS = 16
"""Of the simulated program. The core cuts a share into eight slices or more, and does not wait for all
slices of one round before those of the next."""
_RESOLUTION = 100
"""Chunks of a round, which the shares are rounded to."""


def best(rates: Sequence[float]) -> str | None:
    """The algorithm for ranks whose links carry `rates` bytes/s; None if even shares will do."""
    p = len(rates)
    if p < 3 or max(rates) < _EVEN * min(rates):
        return None
    low, high = 0.0, p / min(rates)  # seconds per byte: the more time there is, the larger the shares may be
    for _ in range(60):
        middle = (low + high) / 2
        if sum(max(0.0, (middle * rate - 1) / (p - 2)) for rate in rates) < 1:
            low = middle
        else:
            high = middle
    time = max(high, 1 / min(rates))  # the slowest link takes at least this long
    limits = [max(0.0, (time * rate - 1) / (p - 2)) for rate in rates]
    weights = [round(100 * limit / sum(limits)) for limit in limits]
    return name_of(weights)


def name_of(weights: Sequence[float]) -> str:
    """How a user writes these weights."""
    return str(Spec(DIRECT, {"shares": tuple(weights)}))


@functools.lru_cache(maxsize=64)
def parse(algorithm: str, num_ranks: int) -> tuple[float, ...] | None:
    """The shares, which sum to 1; None for other algorithms. ConfigError unless there are P weights."""
    try:
        wanted = spec.parse(algorithm)
    except ConfigError:
        if not algorithm.startswith(f"{DIRECT}("):
            raise
        wanted = Spec(DIRECT, {"shares": None})  # weights that are no numbers
    if wanted.name != DIRECT or not wanted.arguments:
        return None
    given = wanted.arguments.get("shares")
    weights = given if isinstance(given, tuple) else (given,)
    numbers = [float(w) for w in weights if isinstance(w, int | float) and not isinstance(w, bool)]
    is_fine = (
        list(wanted.arguments) == ["shares"]
        and len(numbers) == len(weights) == num_ranks
        and min(numbers) >= 0
        and 0 < sum(numbers) < float("inf")
    )
    if not is_fine:
        raise ConfigError(
            f"algorithm={algorithm!r}: {DIRECT}(shares=…) needs {num_ranks} weights >= 0 with '/' between"
            " them, one for every rank, not all 0"
        )
    return tuple(weight / sum(numbers) for weight in numbers)


def counts(numel: int, shares: Sequence[float], *, multiple: int = 64) -> list[int]:
    """`numel` elements divided by shares, between multiples of `multiple`."""
    ends = [numel * total for total in itertools.accumulate(shares)]
    edges = [0, *(min(numel, round(end / multiple) * multiple) for end in ends)]
    last = max(r for r, share in enumerate(shares) if share > 0)
    edges[last + 1 :] = [numel] * (len(edges) - last - 1)
    return [b - a for a, b in itertools.pairwise(edges)]


def program(shares: Sequence[float]) -> Program:
    """The same for the simulator: contributions of a round travel beside the results of the one before."""
    p = len(shares)
    sizes = counts(max(_RESOLUTION, 2 * p), shares, multiple=1)  # chunks that each rank owns in every round
    firsts = [0, *itertools.accumulate(_ROUNDS * size for size in sizes)]
    pairs = [(r, owner) for owner in range(p) if sizes[owner] for r in range(p) if r != owner]

    def first(owner: int, k: int) -> int:
        return firsts[owner] + k * sizes[owner]

    def contributions(k: int) -> Step:
        own = [copy(r, r, first(r, k), source=INPUT, count=sizes[r]) for r in range(p)]
        moved = [reduce(r, o, first(o, k), source=INPUT, count=sizes[o]) for r, o in pairs]
        return together(*own, *moved)

    def results(k: int) -> Step:
        return together(*(copy(o, r, first(o, k), count=sizes[o]) for r, o in pairs))

    def steps() -> Iterator[Step]:
        yield contributions(0)
        for k in range(1, _ROUNDS):
            yield together(contributions(k), results(k - 1))
        yield results(_ROUNDS - 1)

    return Program("direct", "all_reduce", p, firsts[-1], steps)
