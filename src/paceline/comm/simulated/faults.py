"""The faults of a simulation: written as a script, or drawn from a seed. Times are virtual seconds.

    kill(rank=3, at_s=1.5)                        the worker's process ends; peers notice after `detect_s`
    pause(rank=1, at_s=2, for_s=3)                the worker neither computes nor answers
    slow(rank=0, at_s=0, for_s=10, factor=4)      its compute times are multiplied
    drop_link(src=0, dst=1, at_s=1, for_s=2)      nothing passes between the two, either way
    partition(ranks="0 1 2", at_s=1, for_s=2)     nothing passes between these and the others
    join(rank=5, at_s=3)                          the worker starts late
    random(kills=1, pauses=2, until_s=10)         drawn from the simulation's seed; rank 0 is never killed

Several are joined by `+`: "kill(rank=3, at_s=1.5)+pause(rank=1, at_s=2, for_s=3)". Without `for_s` a fault
never ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from paceline import spec as specs
from paceline.errors import ConfigError
from paceline.registry import unknown

FOREVER = float("inf")
_MOST_RANDOM = 10_000


@dataclass(frozen=True)
class Interval:
    """Something that holds for some ranks during [start_s, end_s)."""

    ranks: tuple[int, ...]
    start_s: float
    end_s: float
    factor: float = 1.0

    def covers(self, time_s: float) -> bool:
        """Whether it holds at `time_s`."""
        return self.start_s <= time_s < self.end_s


@dataclass
class Faults:
    """A script of faults, sorted by kind."""

    kills: list[tuple[int, float]] = field(default_factory=list)
    """rank, at_s"""
    pauses: list[Interval] = field(default_factory=list)
    slow: list[Interval] = field(default_factory=list)
    cuts: list[Interval] = field(default_factory=list)
    """Nothing passes between `ranks` and all others; a dropped link is kept in `links`."""
    links: list[Interval] = field(default_factory=list)
    joins: dict[int, float] = field(default_factory=dict)

    def phases(self) -> dict[str, list[Interval]]:
        """The faults that last for a known time, by name: slow phases, cuts, dropped links, late starts."""
        late = [Interval((rank,), 0.0, at_s) for rank, at_s in sorted(self.joins.items())]
        return {"slow": self.slow, "partition": self.cuts, "drop_link": self.links, "not joined": late}

    def slowdown(self, rank: int, time_s: float) -> float:
        """Product of the factors of all slow phases of `rank` at `time_s`."""
        product = 1.0
        for phase in self.slow:
            if rank in phase.ranks and phase.covers(time_s):
                product *= phase.factor
        return product

    def open_at(self, src: int, dst: int, time_s: float) -> float:
        """Earliest time from `time_s` on at which src and dst can exchange bytes; infinite if never."""
        return self._opens(src, dst, time_s)[0]

    def closed_for_ever(self, src: int, dst: int, time_s: float) -> str:
        """Describe the fault that closes the link for ever at `time_s`, and what to do; "" if none does."""
        opens_s, cut = self._opens(src, dst, time_s)
        if cut is None or opens_s < FOREVER:
            return ""
        a, b = cut.ranks[0], cut.ranks[-1]
        listed = " ".join(map(str, cut.ranks))
        what = f"drop_link(src={a}, dst={b}" if cut in self.links else f"partition(ranks='{listed}'"
        return (
            f"nothing has passed the link {src}→{dst} (either way) since {cut.start_s:g} s, nor ever will: "
            f"{what}, at_s={cut.start_s:g}) has no for_s; "
            "give it one, or end the ranks that are cut off with kill(rank=…, at_s=…)"
        )

    def _opens(self, src: int, dst: int, time_s: float) -> tuple[float, Interval | None]:
        """When src and dst can exchange bytes, and the last fault that delays it."""
        last, changed = None, src != dst and bool(self.cuts or self.links)
        while changed:
            changed = False
            for cut in [*self.cuts, *self.links]:
                if cut in self.links:
                    hit = src in cut.ranks and dst in cut.ranks
                else:
                    hit = (src in cut.ranks) != (dst in cut.ranks)
                if hit and cut.covers(time_s):
                    time_s, last, changed = cut.end_s, cut, True
        return time_s, last


def parse(text: str, *, num_workers: int, seed: int) -> Faults:
    """Read a script (empty: nothing goes wrong). Raises ConfigError."""
    faults = Faults()
    if not text.strip():
        return faults
    rng = np.random.default_rng([seed, 0xFA])
    for term in specs.parse_sum(text):
        if term.name not in _KINDS:
            raise ConfigError(unknown("fault", term.name, _KINDS))
        add = specs.call(_KINDS[term.name], term, kind="fault")
        add(faults, num_workers, rng)
    return faults


Add = Callable[[Faults, int, np.random.Generator], None]


def _kill(*, rank: int, at_s: float) -> Add:
    return lambda f, n, rng: f.kills.append((_rank(rank, n), _time(at_s)))


def _pause(*, rank: int, at_s: float, for_s: float) -> Add:
    return lambda f, n, rng: f.pauses.append(_interval([rank], n, at_s, for_s))


def _slow(*, rank: int, factor: float, at_s: float = 0.0, for_s: float = FOREVER) -> Add:
    return lambda f, n, rng: f.slow.append(_interval([rank], n, at_s, for_s, factor))


def _drop_link(*, src: int, dst: int, at_s: float, for_s: float = FOREVER) -> Add:
    if src == dst:
        raise ConfigError(f"drop_link(src={src}, dst={dst}): two different ranks expected")
    return lambda f, n, rng: f.links.append(_interval([src, dst], n, at_s, for_s))


def _partition(*, ranks: str, at_s: float, for_s: float = FOREVER) -> Add:
    try:
        members = [int(r) for r in str(ranks).replace(",", " ").split()]
    except ValueError:
        raise ConfigError(f'ranks="0 1 2" expected, got {ranks!r}') from None
    return lambda f, n, rng: f.cuts.append(_interval(members, n, at_s, for_s))


def _join(*, rank: int, at_s: float) -> Add:
    return lambda f, n, rng: f.joins.__setitem__(_rank(rank, n), _time(at_s))


def _random(*, kills: int = 0, pauses: int = 0, until_s: float = 1.0) -> Add:
    def add(faults: Faults, num_workers: int, rng: np.random.Generator) -> None:
        for name, value in (("kills", kills), ("pauses", pauses)):
            specs.whole_number(f"random faults: {name}", value, least=0)
            if value > _MOST_RANDOM:
                raise ConfigError(f"random faults: {name}={value}: at most {_MOST_RANDOM} expected")
        if not _time(until_s) > 0:
            raise ConfigError(f"random faults: until_s={until_s}: more than 0 expected")
        if kills > num_workers - 1:
            raise ConfigError(
                f"{kills} random kills among {num_workers} workers: rank 0 and one more must stay"
            )
        for rank in rng.permutation(np.arange(1, num_workers))[:kills]:
            faults.kills.append((int(rank), float(rng.uniform(0, until_s))))
        for _ in range(pauses):
            start, length = float(rng.uniform(0, until_s)), float(rng.uniform(0, until_s / 4))
            rank = int(rng.integers(num_workers))
            faults.pauses.append(Interval((rank,), start, start + length))

    return add


_KINDS: dict[str, Callable[..., Add]] = {
    "kill": _kill,
    "pause": _pause,
    "slow": _slow,
    "drop_link": _drop_link,
    "partition": _partition,
    "join": _join,
    "random": _random,
}


def _rank(rank: object, num_workers: int) -> int:
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise ConfigError(f"a fault names rank {rank}: a whole number expected")
    if not 0 <= rank < num_workers:
        raise ConfigError(
            f"a fault names rank {rank}; there are {num_workers} workers, 0 … {num_workers - 1}"
        )
    return rank


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"a fault with {name}={value}: a number expected")
    try:
        return float(value)
    except OverflowError:
        raise ConfigError(f"a fault with {name}: a number below 1e308 expected") from None


def _time(at_s: object) -> float:
    time_s = _number("at_s", at_s)
    if not 0 <= time_s < FOREVER:
        raise ConfigError(f"a fault at {at_s} s: at_s >= 0 expected")
    return time_s


def _interval(
    ranks: Sequence[int], num_workers: int, at_s: float, for_s: float, factor: float = 1.0
) -> Interval:
    length_s, factor = _number("for_s", for_s), _number("factor", factor)
    if not length_s > 0 or not 0 < factor < FOREVER:
        raise ConfigError(f"a fault with for_s={for_s}, factor={factor}: both must be above 0")
    start_s = _time(at_s)
    return Interval(tuple(_rank(r, num_workers) for r in ranks), start_s, start_s + length_s, factor)
