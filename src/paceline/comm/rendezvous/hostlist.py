"""Slurm's compressed host lists: `node[07-09,12],gpu[1-2]-ib` means six hosts."""

from __future__ import annotations

import itertools
import re

from paceline.errors import ConfigError
from paceline.user_input import digits, shortened

_MAX_HOSTS = 1 << 16
_MAX_NAME = 255  # of a name in the DNS


def expand(text: str) -> list[str]:
    """Every host in Slurm's order. Leading zeros are kept; one name may have several ranges.

    Raises ConfigError for unbalanced brackets, ranges that run backwards, and more than 65,536 hosts.
    """
    shown = shortened(text)
    hosts: list[str] = []
    for term in _split(text, shown):
        parts = re.split(r"\[([^\[\]]*)\]", term)
        if any(c in part for part in parts for c in "[]"):
            raise ConfigError(f"host list {shown}: unbalanced brackets in {shortened(term)}")
        choices = [_numbers(p, shown) if i % 2 else [p] for i, p in enumerate(parts)]
        if sum(max(map(len, words)) for words in choices) > _MAX_NAME:
            raise ConfigError(f"host list {shown}: names of at most {_MAX_NAME} characters expected")
        hosts += ["".join(words) for words in itertools.islice(itertools.product(*choices), _MAX_HOSTS + 1)]
        if len(hosts) > _MAX_HOSTS:
            raise ConfigError(f"host list {shown}: at most {_MAX_HOSTS} hosts expected")
    return hosts


def expand_counts(text: str) -> list[int]:
    """Slurm's tasks per node, one number for each host: `2(x3),1` means 2, 2, 2, 1."""
    counts: list[int] = []
    for term in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,9})(?:\(x([0-9]{1,9})\))?\s*", term)
        if match is None:
            raise ConfigError(f"tasks per node {shortened(text)}: numbers such as 2(x3),1 expected")
        times = int(match[2] or 1)
        if len(counts) + times > _MAX_HOSTS:
            raise ConfigError(f"tasks per node {shortened(text)}: at most {_MAX_HOSTS} hosts expected")
        counts += [int(match[1])] * times
    return counts


def _split(term: str, shown: str) -> list[str]:
    """Split at commas outside brackets; `shown` is the list in errors."""
    found, depth, begin = [], 0, 0
    for i, c in enumerate(term):
        depth += (c == "[") - (c == "]")
        if depth not in (0, 1):
            raise ConfigError(f"host list {shown}: unbalanced brackets")
        if c == "," and depth == 0:
            found.append(term[begin:i])
            begin = i + 1
    if depth:
        raise ConfigError(f"host list {shown}: unbalanced brackets")
    return [name for part in [*found, term[begin:]] if (name := part.strip())]


def _numbers(inside: str, shown: str) -> list[str]:
    found: list[str] = []
    for term in inside.split(","):
        first, dash, last = term.strip().partition("-")
        last = last if dash else first
        low, high = digits(first), digits(last)
        if low is None or high is None or not 0 <= high - low < _MAX_HOSTS:
            raise ConfigError(f"host list {shown}: a range such as 07-12 expected, got {shortened(term)}")
        if len(found) + high - low >= _MAX_HOSTS:
            raise ConfigError(f"host list {shown}: at most {_MAX_HOSTS} hosts expected")
        found += [str(n).zfill(len(first)) for n in range(low, high + 1)]
    return found
