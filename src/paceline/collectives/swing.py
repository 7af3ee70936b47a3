"""Swing: all-reduce between ranks that alternately lie ahead and behind, and so stay near on a ring.

In step s rank r meets r + ρ(s) if it is even and r − ρ(s) if it is odd, with ρ(s) = 1, −1, 3, −5, 11 …: about
2^s · 2/3 places away in place of recursive doubling's 2^s. On rings and tori messages cross fewer links.

Source: De Sensi et al., Swing, NSDI 2024.
Cost: two shots 2 lg P steps and 2(P−1)/P of the bytes per rank; one shot lg P steps of all the bytes, for
small buffers. Ranks beyond a power of two are folded into their neighbours: two steps and all the bytes more.
Ranks: any.   [tested]
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from paceline.schedule.cost import Cost, No, only
from paceline.schedule.program import INPUT, IntArray, Program, Step, copy, ranks, reduce

OPERATIONS = ("all_reduce",)
VARIANTS: tuple[dict[str, int], ...] = ({"shots": 1}, {"shots": 2})


def build(operation: str, num_ranks: int, *, root: int = 0, shots: int = 2) -> Program:
    """Build the program; ranks beyond a power of two are folded into their neighbours.

    Args:
        shots: 2 (default): reduce-scatter, then all-gather. 1: partners exchange everything, in half of the
            steps, which suits buffers of a few kilobytes.
    """
    p, rounds = num_ranks, num_ranks.bit_length() - 1
    core = 1 << rounds
    extra = p - core  # of the first 2·extra ranks the even ones are folded into their neighbours
    v = ranks(core)
    real = np.where(v < extra, 2 * v + 1, v + extra)
    folded = 2 * v[:extra]
    chunks = core if shots == 2 else 1

    def steps() -> Iterator[Step]:
        yield copy(ranks(p), ranks(p), 0, source=INPUT, count=chunks)
        yield reduce(folded, folded + 1, 0, count=chunks)
        if shots == 1:
            for s in reversed(range(rounds)):  # so that partners have sums of the same ranks, and equal bits
                yield reduce(real, real[partners(core, s)], 0)
        else:
            yield from _exchange(real)
        yield copy(folded + 1, folded, 0, count=chunks)

    return Program("swing", operation, p, chunks, steps)


def partners(p: int, s: int) -> IntArray:
    """The partner of every rank in step s, shape (P,); P is a power of two."""
    v = ranks(p)
    distance = (1 - (-2) ** (s + 1)) // 3
    partner: IntArray = (v + np.where(v % 2 == 0, distance, -distance)) % p
    return partner


def _exchange(real: IntArray) -> Iterator[Step]:
    """Reduce-scatter and all-gather of as many chunks as there are ranks in `real`.

    In each step partners divide the range of chunks that both share; the one whose later partners include
    the lowest rank keeps the lower half, as do all of these.
    """
    p = len(real)
    rounds = p.bit_length() - 1
    lowest = [ranks(p)]  # of those that a rank meets from step s on, itself included; the last step first
    for s in reversed(range(rounds)):
        lowest.append(np.minimum(lowest[-1], lowest[-1][partners(p, s)]))
    low, halves = np.zeros(p, dtype=np.intp), []
    for s in range(rounds):
        partner, own, half = partners(p, s), lowest[rounds - s - 1], p >> (s + 1)
        is_upper = (own > own[partner]).astype(np.intp)
        sent, kept = low + (1 - is_upper) * half, low + is_upper * half
        yield reduce(real, real[partner], sent, count=half)
        halves.append((partner, kept, half))
        low = kept
    for partner, kept, half in reversed(halves):
        yield copy(real, real[partner], kept, count=half)


def supports(operation: str, num_ranks: int, *, shots: int = 2) -> bool | No:
    """Any number of ranks."""
    if shots not in (1, 2):
        return No(f"1 or 2 shots expected, got {shots}")
    return only(OPERATIONS, operation)


def cost(operation: str, num_ranks: int, *, root: int = 0, shots: int = 2) -> Cost:
    """⌊lg P⌋ steps per shot, and two for folding; the bytes are those of the busiest rank."""
    rounds = num_ranks.bit_length() - 1
    core = 1 << rounds
    fold = int(num_ranks != core)
    if shots == 1:
        share = Fraction(rounds + fold)
        return Cost(rounds + 2 * fold, rounds + fold, share, share, has_closed_form=not fold)
    share = Fraction(core - 1, core)
    path = 2 * (share + fold)
    return Cost(2 * (rounds + fold), 2 * rounds + fold, 2 * share + fold, share + fold, path_sent=path)
