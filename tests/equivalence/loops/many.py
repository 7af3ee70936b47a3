"""Many generated loops, by several processes; what differs is shrunk, and a table says what was covered.

python tests/equivalence/loops/many.py 20000 --seed 0 --jobs 2 --table loops.md
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import multiprocessing
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]  # also as a script

from choices import DIMENSIONS, Choices, draw, told  # noqa: E402
from test_loops import difference, smallest  # noqa: E402

LIMIT_S = 300
"""A loop that takes longer hangs."""
CHUNK = 50
"""Loops of one process, after which it ends and another begins."""


def wrong_ones(seeds: range) -> list[tuple[int, str, str]]:
    """Of these loops: seed, the smallest loop that differs, and how it does."""
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, _hangs)
    found = []
    for seed in seeds:
        signal.alarm(LIMIT_S)
        c = draw(seed)
        if wrong := difference(c):
            signal.alarm(0)
            small = smallest(c)
            found.append((seed, told(small), difference(small) or wrong))
        signal.alarm(0)
    return found


def _hangs(*_: Any) -> None:
    faulthandler.dump_traceback()
    raise TimeoutError(f"hangs: not over after {LIMIT_S} s")


def in_chunks(first: int, count: int) -> Iterator[range]:
    for start in range(first, first + count, CHUNK):
        yield range(start, min(start + CHUNK, first + count))


def table(loops: Iterable[Choices]) -> str:
    """How often each choice was drawn, and which two were never drawn together, as Markdown."""
    single: Counter[tuple[str, Any]] = Counter()
    both: set[tuple[str, Any, str, Any]] = set()
    count = 0
    for c in loops:
        count += 1
        single.update(c.items())
        both.update((a, c[a], b, c[b]) for a, b in itertools.combinations(DIMENSIONS, 2))
    lines = [f"{count} loops.", "", "| choice | loops |", "|---|---|"]
    for name, values in DIMENSIONS.items():
        lines.append(f"| {name} | " + ", ".join(f"{v} {single[name, v]}" for v in values) + " |")
    lines += ["", "| two choices | drawn together | of | never |", "|---|---|---|---|"]
    for a, b in itertools.combinations(DIMENSIONS, 2):
        possible = list(itertools.product(DIMENSIONS[a], DIMENSIONS[b]))
        never = [f"{x} + {y}" for x, y in possible if (a, x, b, y) not in both]
        if never:
            told_never = ", ".join(never[:6]) + (f" and {len(never) - 6} more" if len(never) > 6 else "")
            lines.append(f"| {a}, {b} | {len(possible) - len(never)} | {len(possible)} | {told_never} |")
    total = sum(len(DIMENSIONS[a]) * len(DIMENSIONS[b]) for a, b in itertools.combinations(DIMENSIONS, 2))
    lines += ["", f"All other dimensions: every pair. In all {len(both)} of {total} pairs of choices."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0, help="of the first loop")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--table", type=Path, help="where to write the table of choices")
    options = parser.parse_args()
    found: Counter[str] = Counter()
    done, began = 0, time.monotonic()
    with multiprocessing.get_context("spawn").Pool(options.jobs, maxtasksperchild=1) as pool:
        chunks = in_chunks(options.seed, options.count)
        for chunk, wrong in zip(
            in_chunks(options.seed, options.count), pool.imap(wrong_ones, chunks), strict=True
        ):
            done += len(chunk)
            for seed, small, how in wrong:
                found[small] += 1
                if found[small] == 1:  # others are the same fault, most likely
                    print(f"seed {seed}: {small}: {how}", flush=True)
            if done % 1000 == 0:
                print(f"{done} loops, {done / (time.monotonic() - began):.1f}/s", flush=True)
    print(f"{done} loops from seed {options.seed}: {sum(found.values())} wrong")
    if options.table:
        options.table.write_text(table(draw(s) for s in range(options.seed, options.seed + options.count)))


if __name__ == "__main__":
    main()
