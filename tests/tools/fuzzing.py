"""Damaged user input for parsers, and what is expected of them: a result or one of our own errors.

`damaged(parser, count, seed)` gives inputs: a parser's examples with one piece replaced by each thing that
parsers stumble over, then examples with several random changes. `check(parser, data)` holds the parser to its
promise, in bounded time and memory.

    python tests/tools/fuzzing.py 1800        fuzzes every parser in turn, 1,800 seconds in all
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import random
import resource
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from paceline.errors import PacelineError

LIMIT_S = 0.5
LIMIT_BYTES = 1 << 28
"""What one input may add to the largest memory of this process."""
_NASTY = """0 -1 1 2 9999999999999999999999 1e400 -1e400 1e-400 nan inf 1_000 ² ٣ 0x10 1. .5 -0 1e308
4294967296 65536 99999999 9e18 true none null [] {} [[]] "" ' " ( ) [ ] { } , : = + / - .. \\ % # ~ *
a b ranks hosts rails gbit rank at_s for_s factor -5 1.5 NaN Infinity 'x' ["x",1] {"a":1}""".split()
_NASTY += [" ", "\n", "\t", "\0", "\ud800", "é", "\u2028", "\ufeff", "🙂", "", "a+b", "a(b=1)"]
_LONG = [
    "9" * 5000,
    "a" * 3000,
    "(" * 900,
    "[" * 50_000,
    '{"a":' * 20_000,
    "a(b=" * 900,
    ",1" * 1900,
    "1/" * 1900,
]
_ALL = _NASTY + _LONG
_BYTES = (b"\xff" * 8, bytes(8), b"\x7f" + b"\xff" * 7, b"", b"\n", b"\x80")


@dataclasses.dataclass(frozen=True)
class Parser:
    """One parser of user input.

    `covers`: the functions that it runs, as `module:name`; the meta test compares them with the package.
    """

    name: str
    call: Callable[[Any], object]
    examples: tuple[str | bytes, ...]
    covers: tuple[str, ...]
    rejects_examples: bool = False
    """Some examples need what is not on every machine."""


def check(parser: Parser, data: str | bytes) -> None:
    """Parse `data`: a result or a PacelineError, within the limits of time and memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    took_s = _cpu_s(parser, data)
    if took_s >= LIMIT_S:  # a collection of garbage, or another thread's work, does not come twice
        took_s = _cpu_s(parser, data)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < LIMIT_BYTES, f"{parser.name} took {grown >> 20} MiB on {data[:200]!r}"
    assert took_s < LIMIT_S, f"{parser.name} took {took_s:.2f} s on {data[:200]!r}"


def _cpu_s(parser: Parser, data: str | bytes) -> float:
    began = time.process_time()
    with contextlib.suppress(PacelineError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parser.call(data)
    return time.process_time() - began


def warm_up(parser: Parser) -> None:
    """Parse the examples, so that what is imported once is not counted. All of them are accepted."""
    for example in parser.examples:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with contextlib.suppress(*([PacelineError] if parser.rejects_examples else [])):
                parser.call(example)


def damaged(parser: Parser, seed: int = 0) -> Iterator[str | bytes]:
    """Inputs without end; the first ones are the systematic ones, in random order."""
    rng = random.Random(seed)
    if isinstance(parser.examples[0], bytes):
        yield b""
        while True:
            yield _changed_bytes(bytes(rng.choice(parser.examples)), rng)  # type: ignore[arg-type]
    texts = [str(e) for e in parser.examples]
    single = [
        (pieces, at, token)
        for pieces in map(_pieces, texts)
        for at, token in itertools.product(range(len(pieces)), _ALL)
    ]
    rng.shuffle(single)
    yield from ("", " ", *_ALL)
    for pieces, at, token in single:
        yield "".join([*pieces[:at], token, *pieces[at + 1 :]])
    while True:
        yield _changed_text(rng.choice(texts), rng)


def _changed_text(text: str, rng: random.Random) -> str:
    pieces = _pieces(text)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(pieces) + 1)
        kind = rng.randrange(6)
        if kind == 0:
            del pieces[at : at + rng.randint(1, 3)]
        elif kind == 1:
            pieces[at:at] = pieces[at : at + 3] * rng.randint(1, 3)
        elif kind == 2 and pieces:
            pieces[at - 1], pieces[at // 2 - 1] = pieces[at // 2 - 1], pieces[at - 1]
        elif kind == 3:
            pieces[at:at] = [rng.choice(_ALL)]
        elif kind == 4:
            pieces[at : at + 1] = [rng.choice(_NASTY)]
        else:
            pieces[at : at + 1] = [chr(rng.randrange(1, 0x250))]
    return "".join(pieces)


def _pieces(text: str) -> list[str]:
    """Words, numbers and single marks."""
    pieces: list[str] = []
    for c in text:
        if pieces and c.isalnum() and pieces[-1][-1].isalnum():
            pieces[-1] += c
        else:
            pieces.append(c)
    return pieces


def _changed_bytes(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        at, kind = rng.randrange(len(changed) + 1), rng.randrange(4)
        if kind == 0:
            del changed[at : at + rng.randint(1, 64)]
        elif kind == 1:
            changed[at:at] = rng.randbytes(rng.randint(1, 8))
        elif kind == 2:
            changed[at : at + 1] = rng.randbytes(1)
        else:
            changed[at : at + 8] = rng.choice(_BYTES)
    return bytes(changed)


def fuzz_all(parsers: tuple[Parser, ...], seconds: float, *, seed: int) -> int:
    """Fuzz every parser for its share of the time; prints each kind of failure once, returns how many."""
    failures: set[tuple[str, ...]] = set()
    for parser in parsers:
        warm_up(parser)
        ends, tried = time.monotonic() + seconds / len(parsers), 0
        for data in damaged(parser, seed):
            if time.monotonic() > ends:
                break
            tried += 1
            try:
                check(parser, data)
            except Exception as error:
                own = [f for f in traceback.extract_tb(error.__traceback__) if "paceline/" in f.filename]
                place = f"{own[-1].filename.rpartition('paceline/')[2]}:{own[-1].lineno}" if own else "limits"
                kind = (parser.name, type(error).__name__, place)
                if kind not in failures:
                    print(f"{' '.join(kind)}: {str(error)[:200]!r} on {data[:200]!r}", flush=True)
                failures.add(kind)
        print(f"{parser.name}: {tried} inputs", flush=True)
    return len(failures)


if __name__ == "__main__":
    from input_parsers import PARSERS

    names = sys.argv[2:]
    chosen = tuple(p for p in PARSERS if not names or p.name in names)
    sys.exit(1 if fuzz_all(chosen, float(sys.argv[1]), seed=time.time_ns()) else 0)
