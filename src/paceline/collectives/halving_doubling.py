"""Halving-doubling: reduce-scatter over doubling distances, then all-gather over halving ones.

Source: Rabenseifner, ICCS 2004; Thakur, Rabenseifner & Gropp, IJHPCA 19(1), 2005.
Cost: 2 lg P steps, 2(P−1)/P of the bytes sent per rank for a power of two. Otherwise 2^⌊lg P⌋ ranks take
part and the others are folded into their neighbours: 2⌊lg P⌋ + 2 steps and up to twice the bytes.
reduce_scatter and all_gather take the distances in the opposite order, so that rank r ends with block r.
Ranks: any.   [tested]
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from paceline.schedule.contract import base_operation
from paceline.schedule.cost import Cost, No, only
from paceline.schedule.program import (
    INPUT,
    OUTPUT,
    SCRATCH,
    Buffer,
    IntArray,
    Program,
    Step,
    copy,
    ranks,
    reduce,
    together,
)

OPERATIONS = ("all_reduce", "reduce_scatter", "all_gather", "reduce_scatter_v", "all_gather_v")


def build(operation: str, num_ranks: int, *, root: int = 0) -> Program:
    """Build the program; ranks beyond a power of two are folded into their neighbours."""
    op, p = base_operation(operation), num_ranks
    core = 1 << (p.bit_length() - 1)
    extra = p - core
    me, folded = ranks(p), 2 * ranks(core)[:extra]
    work = SCRATCH if op == "reduce_scatter" else OUTPUT
    chunks = core if op == "all_reduce" else p

    def steps() -> Iterator[Step]:
        if op == "all_gather":
            yield copy(me, me, 0, to=me, source=INPUT)
            yield copy(folded, folded + 1, folded)
        else:
            yield copy(me, me, 0, source=INPUT, into=work, count=chunks)
            yield reduce(folded, folded + 1, 0, source=work, into=work, count=chunks)
            yield from halve(p, op, work)
        if op == "reduce_scatter":
            yield copy(folded + 1, folded, folded, source=work, into=work)
            yield copy(me, me, me, to=0, source=work)
            return
        yield from double(p, op)
        if op == "all_reduce":
            yield copy(folded + 1, folded, 0, count=chunks)
        else:  # all blocks except its own
            before = copy(folded + 1, folded, 0, count=folded)
            after = copy(folded + 1, folded, folded + 1, count=p - 1 - folded)
            yield together(before, after)

    scratch = p if work is SCRATCH else 0
    return Program("halving_doubling", operation, p, chunks, steps, num_scratch=scratch)


def halve(p: int, op: str, work: Buffer) -> Iterator[Step]:
    """Reduce-scatter: in each round a rank sends its partner half of the range that both still share."""
    for real, partner, low, middle, high, is_upper in _rounds(p, op):
        start = np.where(is_upper, low, middle)
        end = np.where(is_upper, middle, high)
        yield reduce(real, real[partner], start, count=end - start, source=work, into=work)


def double(p: int, op: str) -> Iterator[Step]:
    """All-gather: the same rounds in reverse; in each a rank copies all that it holds to its partner."""
    for real, partner, low, middle, high, is_upper in reversed(list(_rounds(p, op))):
        start = np.where(is_upper, middle, low)
        end = np.where(is_upper, high, middle)
        yield copy(real, real[partner], start, count=end - start)


def _rounds(p: int, op: str) -> Iterator[tuple[IntArray, ...]]:
    """For every round: rank, partner, low, middle and high end of the range that both share, is_upper.

    Each has shape (2^⌊lg P⌋,). `partner` is an index into the ranks that take part; `is_upper` says which
    ranks keep the upper half.
    """
    count = p.bit_length() - 1
    core = 1 << count
    extra = p - core
    v = ranks(core)
    real = np.where(v < extra, 2 * v + 1, v + extra)
    positions = np.arange(core + 1)
    bound = positions if op == "all_reduce" else positions + np.minimum(positions, extra)
    low = np.zeros(core, dtype=np.intp)
    for i in range(count):
        bit = i if op == "all_reduce" else count - 1 - i
        half = core >> (i + 1)
        is_upper = (v >> bit) & 1
        yield real, v ^ (1 << bit), bound[low], bound[low + half], bound[low + 2 * half], is_upper
        low = low + is_upper * half


def supports(operation: str, num_ranks: int) -> bool | No:
    """Any number of ranks."""
    return only(OPERATIONS, operation)


def cost(operation: str, num_ranks: int, *, root: int = 0) -> Cost:
    """⌊lg P⌋ rounds per phase, and folding; the bytes are those of the busiest rank."""
    op, p = base_operation(operation), num_ranks
    rounds = p.bit_length() - 1
    core = 1 << rounds
    fold = int(p != core)
    share = Fraction(core - 1, core)
    if op == "all_reduce":
        messages = 2 * rounds + fold
        path = 2 * (share + fold)
        return Cost(2 * (rounds + fold), messages, 2 * share + fold, share + fold, path_sent=path)
    messages = rounds + fold
    if not fold:
        return Cost(rounds, messages, share, share if op == "reduce_scatter" else Fraction(0))
    # The busiest is rank 1, which has two blocks; its group of 2^k ranks has 2^k + min(2^k, extra) blocks.
    grouped = sum((1 << k) + min(1 << k, p - core) for k in range(rounds))
    if op == "all_gather":
        path = Fraction(grouped + p, p)
        return Cost(rounds + 2, messages, Fraction(grouped + p - 1, p), path_sent=path)
    # Reductions overlap transfers here in a way that has no closed form.
    return Cost(rounds + 2, messages, Fraction(1), Fraction(p + grouped, p), has_closed_form=False)
