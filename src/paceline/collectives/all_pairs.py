"""All pairs: every rank sends to every other, in one shot or as reduce-scatter and all-gather in two.

Source: one-shot and two-shot all-reduce of shared-memory and NVLink systems, as in MSCCL.
Cost: one-shot all_reduce 1 step, P−1 times all the bytes sent and reduced per rank, lowest latency; two-shot
2 steps, 2(P−1)/P of the bytes. P−1 messages per rank and step, concurrent on shared memory.
Ranks: any.   [tested]
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from paceline.schedule.contract import base_operation
from paceline.schedule.cost import Cost, No, few_enough, only
from paceline.schedule.program import (
    COPY,
    INPUT,
    OUTPUT,
    REDUCE,
    SCRATCH,
    Op,
    Program,
    Step,
    copy,
    ranks,
    reduce,
    step_of,
    together,
    turn,
)

OPERATIONS = (
    "all_reduce",
    "reduce_scatter",
    "all_gather",
    "all_to_all",
    "reduce_scatter_v",
    "all_gather_v",
    "all_to_all_v",
)
VARIANTS: tuple[dict[str, int], ...] = ({"shots": 1}, {"shots": 2})


def build(operation: str, num_ranks: int, *, root: int = 0, shots: int = 2) -> Program:
    """Build the program for any number of ranks.

    Args:
        shots: Steps of an all_reduce, 1 or 2; default 2. One shot halves the steps and sends P/2 times the
            bytes: choose it for buffers of a few kilobytes. Other operations ignore it.
    """
    op, p = base_operation(operation), num_ranks
    me = ranks(p)
    others = [turn(p, k) for k in range(1, p)]
    work = SCRATCH if op == "reduce_scatter" else OUTPUT

    def one_shot() -> Iterator[Step]:
        """Every rank adds up in the order of ranks, so that all have the same bits."""
        kinds = [COPY] + [REDUCE] * (p - 1)
        pairs = [(src, dst) for src in range(p) for dst in range(p)]
        yield step_of(Op(kinds[src], src, INPUT, 0, dst, OUTPUT, 0) for src, dst in pairs)

    def two_shot() -> Iterator[Step]:
        if op == "all_to_all":
            yield together(*(copy(me, turn(p, k), turn(p, k), to=me, source=INPUT) for k in range(p)))
            return
        if op == "all_gather":
            yield copy(me, me, 0, to=me, source=INPUT)
        else:
            yield copy(me, me, me, source=INPUT, into=work)
            yield together(*(reduce(src, me, me, source=INPUT, into=work) for src in others))
        if op == "reduce_scatter":
            yield copy(me, me, me, to=0, source=work)
        else:
            yield together(*(copy(me, dst, me) for dst in others))

    if op == "all_reduce" and shots == 1:
        return Program("all_pairs", operation, p, 1, one_shot)
    return Program("all_pairs", operation, p, p, two_shot, num_scratch=p if work is SCRATCH else 0)


def supports(operation: str, num_ranks: int, *, shots: int = 2) -> bool | No:
    """Any number of ranks, as long as P² transfers fit in memory."""
    if shots not in (1, 2):
        return No(f"1 or 2 shots expected, got {shots}")
    return few_enough(num_ranks, num_ranks) and only(OPERATIONS, operation)


def cost(operation: str, num_ranks: int, *, root: int = 0, shots: int = 2) -> Cost:
    """One step per shot; every rank sends a message to every other rank in each."""
    p = num_ranks
    some, share = int(p > 1), Fraction(p - 1, p)
    if operation != "all_reduce":
        reduced = share if "reduce" in operation else Fraction(0)
        return Cost(some, (p - 1), share, reduced)
    if shots == 1:
        return Cost(some, (p - 1), Fraction(p - 1), Fraction(p - 1))
    return Cost(2 * some, 2 * (p - 1), 2 * share, share)
