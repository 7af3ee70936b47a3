"""Slurm's compressed host lists: `node[07-09,12],gpu[1-2]-ib` means six hosts."""

from __future__ import annotations

import itertools
import re

from paceline.errors import ConfigError

_MAX_HOSTS = 1 << 16


def expand(text: str) -> list[str]:
    """Every host in Slurm's order. Leading zeros are kept; one name may have several ranges.

    Raises ConfigError for unbalanced brackets, ranges that run backwards, and more than 65,536 hosts.
    """
    hosts: list[str] = []
    for term in _split(text, text):
        parts = re.split(r"\[([^\[\]]*)\]", term)
        if any(c in part for part in parts for c in "[]"):
            raise ConfigError(f"host list {text!r}: unbalanced brackets in {term!r}")
        choices = [_numbers(p, text) if i % 2 else [p] for i, p in enumerate(parts)]
        hosts += ["".join(words) for words in itertools.islice(itertools.product(*choices), _MAX_HOSTS + 1)]
        if len(hosts) > _MAX_HOSTS:
            raise ConfigError(f"host list {text!r}: at most {_MAX_HOSTS} hosts expected")
    return hosts


def expand_counts(text: str) -> list[int]:
    """Slurm's tasks per node, one number for each host: `2(x3),1` means 2, 2, 2, 1."""
    counts: list[int] = []
    for term in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\(x(\d+)\))?\s*", term)
        if match is None:
            raise ConfigError(f"tasks per node {text!r}: numbers such as 2(x3),1 expected")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _split(term: str, text: str) -> list[str]:
    """Split at commas outside brackets."""
    found, depth, begin = [], 0, 0
    for i, c in enumerate(term):
        depth += (c == "[") - (c == "]")
        if depth not in (0, 1):
            raise ConfigError(f"host list {text!r}: unbalanced brackets")
        if c == "," and depth == 0:
            found.append(term[begin:i])
            begin = i + 1
    if depth:
        raise ConfigError(f"host list {text!r}: unbalanced brackets")
    return [name for part in [*found, term[begin:]] if (name := part.strip())]


def _numbers(inside: str, text: str) -> list[str]:
    found: list[str] = []
    for term in inside.split(","):
        first, dash, last = term.strip().partition("-")
        last = last if dash else first
        if not first.isdigit() or not last.isdigit() or not 0 <= int(last) - int(first) < _MAX_HOSTS:
            raise ConfigError(f"host list {text!r}: a range such as 07-12 expected, got {term!r}")
        found += [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    return found
