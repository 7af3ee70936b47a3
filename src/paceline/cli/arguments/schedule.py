"""Arguments of `paceline schedule`, turned into values: algorithms, ranges, sizes, conditions."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from paceline import plugins
from paceline.errors import ConfigError
from paceline.user_input import shortened

if TYPE_CHECKING:
    from paceline.schedule.program import Program
    from paceline.schedule.simulation.simulate import Conditions

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_MAX_BYTES = 10**18
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?(?:e[0-9]+)?)\s*([kmg]i?)?b?\s*", re.IGNORECASE)
_MAX_TRANSFERS_PER_STEP = 1 << 22
_SAMPLE_RANKS = 128


def algorithm(text: str, *, channels: int = 1) -> tuple[str, dict[str, Any]]:
    """`ring_chunked(segments=4)` → the algorithm's own name, and its options with `channels` copies.

    `./zigzag.py(segments=4)` is the algorithm of a user's file.
    """
    from paceline import collectives

    name, options = collectives.parse(plugins.named(text))
    if channels != 1:
        options["channels"] = channels
    collectives.check_options(name, options)
    return collectives.find(name).__name__.rpartition(".")[2], options


def build(name: str, operation: str, num_ranks: int, *, root: int = 0, **options: object) -> Program:
    """As `collectives.build`; ConfigError also for a program that would not fit in memory."""
    from paceline import collectives
    from paceline.schedule import contract

    contract.base_operation(operation)
    too_large = oversized(name, operation, num_ranks, **options)
    if too_large:
        raise ConfigError(too_large)
    return collectives.build(name, operation, num_ranks, root=root, **options)


def oversized(name: str, operation: str, num_ranks: int, **options: object) -> str:
    """Return why this program would be too large to hold, or an empty string."""
    from paceline import collectives

    if not collectives.supports(name, operation, num_ranks, **options):
        return ""  # `build` gives the better reason
    transfers = _largest_step(name, operation, num_ranks, options)
    if transfers <= _MAX_TRANSFERS_PER_STEP:
        return ""
    return f"{name} {operation} on {num_ranks} ranks has steps of {transfers:.1g} transfers: too many to hold"


def _largest_step(name: str, operation: str, num_ranks: int, options: Mapping[str, Any]) -> float:
    """Transfers of the largest step; for many ranks, extrapolated from 128 and 256 ranks."""
    from paceline import collectives

    few = {k: v for k, v in options.items() if k != "hosts"}

    def largest(p: int) -> int:
        program = collectives.build(name, operation, p, **few)
        return max((len(step) for step in program.steps()), default=1)

    if num_ranks <= 2 * _SAMPLE_RANKS:
        return 0
    try:
        small, large = largest(_SAMPLE_RANKS), largest(2 * _SAMPLE_RANKS)
    except ConfigError:  # it does not support the sample's numbers of ranks
        cost = collectives.cost(name, operation, num_ranks, **options)
        return num_ranks * cost.messages / max(cost.steps, 1)
    return float(large * (num_ranks / (2 * _SAMPLE_RANKS)) ** math.log2(large / small))


def ranks(text: str) -> list[int]:
    """`1..17`, `2,4,8`, `1..4,24`: the numbers, ascending, each once."""
    shown, found = shortened(text), set[int]()
    for part in text.split(","):
        ends = re.fullmatch(r"\s*([0-9]{1,9})\s*(?:\.\.\s*([0-9]{1,9})\s*)?", part)
        if ends is None:
            raise ConfigError(
                f"--ranks {shortened(text)}: numbers and ranges such as 8, 2,4,8 or 1..17 expected"
            )
        low, high = int(ends[1]), int(ends[2] or ends[1])
        if not 1 <= low <= high:
            raise ConfigError(f"--ranks {shown}: {part.strip()!r} is not a range of at least one rank")
        if high - low >= (1 << 16) - len(found):
            raise ConfigError(f"--ranks {shown}: at most {1 << 16} numbers")
        found.update(range(low, high + 1))
    return sorted(found)


def size(text: str) -> int:
    """`100000000`, `100MB`, `64MiB`, `1e8`: bytes."""
    match = _SIZE.fullmatch(text)
    num_bytes = math.inf if match is None else float(match[1]) * _UNITS[(match[2] or "").lower()]
    if num_bytes > _MAX_BYTES:
        raise ConfigError(
            f"{shortened(text)} is not a number of bytes up to 10^18; write 100000000, 100MB or 64MiB"
        )
    return round(num_bytes)


def conditions(late: Sequence[str], stragglers: Sequence[str], slow_links: Sequence[str]) -> Conditions:
    """Read `3:0.01`, `3:2.5` and `0-1:10` as Conditions."""
    from paceline.schedule.simulation.simulate import Conditions

    rank = r"([0-9]{1,9})"
    number = r"([0-9]+(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?|\.[0-9]+)"

    def read(texts: Sequence[str], pattern: str, example: str, key: Callable[[re.Match[str]], Any]) -> Any:
        values = {}
        for text in texts:
            match = re.fullmatch(pattern + ":" + number, text)
            if match is None:
                raise ConfigError(f"cannot read {shortened(text)}; an example: {example}")
            values[key(match)] = float(match[match.lastindex or 1])
        return values

    return Conditions(
        late_s=read(late, rank, "--late 3:0.01 (rank 3 enters 10 ms late)", lambda m: int(m[1])),
        slowdown=read(stragglers, rank, "--straggler 3:2.5 (2.5 times slower)", lambda m: int(m[1])),
        slow_links=read(
            slow_links,
            f"{rank}-{rank}",
            "--slow-link 0-1:10 (from rank 0 to rank 1, 10 times slower)",
            lambda m: (int(m[1]), int(m[2])),
        ),
    )


def human_bytes(count: float) -> str:
    """Format a number of bytes, as `1.5 MB`."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} GB"


def human_s(seconds: float) -> str:
    """Format a time, as `1.5 ms`."""
    if seconds >= 1:
        return f"{seconds:.4g} s"
    return f"{seconds * 1e3:.4g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.4g} µs"
