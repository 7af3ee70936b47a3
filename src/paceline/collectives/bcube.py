"""BCube: ranks as digits in base B; each stage is an exchange among the B ranks that differ in one digit.

Source: Guo et al., SIGCOMM 2009; Gloo's bcube all-reduce.
Cost: 2·log_B P steps of B−1 messages, 2(P−1)/P of the bytes sent per rank; base 2 is halving-doubling.
Ranks: a power of the base, which is by default the smallest that P is a power of.   [tested]
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from paceline.schedule.contract import base_operation
from paceline.schedule.cost import Cost, No, few_enough, only
from paceline.schedule.program import (
    INPUT,
    OUTPUT,
    SCRATCH,
    Program,
    Step,
    copy,
    ranks,
    reduce,
    together,
)

OPERATIONS = ("all_reduce", "reduce_scatter", "all_gather", "reduce_scatter_v", "all_gather_v")
VARIANTS: tuple[dict[str, int], ...] = ({}, {"base": 2}, {"base": 3}, {"base": 4})


def stages(num_ranks: int, base: int | None) -> tuple[int, int] | None:
    """(base, number of digits of P − 1 in that base), or None if P is not a power of the base."""
    for b in range(2, num_ranks + 1) if base is None else (base,):
        digits, power = 0, 1
        while power < num_ranks and b > 1:
            digits, power = digits + 1, power * b
        if power == num_ranks:
            return b, digits
    return (2, 0) if num_ranks == 1 else None


def build(operation: str, num_ranks: int, *, root: int = 0, base: int | None = None) -> Program:
    """Reduce-scatter from the highest digit down, all-gather back up.

    Args:
        base: Ranks that exchange in one stage, at least 2; by default the smallest that P is a power of.
            A larger base takes fewer steps with more messages each.
    """
    op, p, me = base_operation(operation), num_ranks, ranks(num_ranks)
    found = stages(p, base)
    assert found is not None
    b, digits = found
    work = SCRATCH if op == "reduce_scatter" else OUTPUT

    def stage(k: int, gathers: bool) -> Step:
        """Stage of digit k: the B ranks that differ only in it share B·B^k chunks, B^k for each."""
        width = b**k
        digit = me // width % b
        start = me // (width * b) * (width * b)  # first chunk that the group still shares
        parts = []
        for i in range(1, b):
            theirs = (digit + i) % b
            peer = me + (theirs - digit) * width
            if gathers:
                parts.append(copy(me, peer, start + digit * width, count=width))
            else:
                chunk = start + theirs * width
                parts.append(reduce(me, peer, chunk, count=width, source=work, into=work))
        return together(*parts)

    def steps() -> Iterator[Step]:
        if op == "all_gather":
            yield copy(me, me, 0, to=me, source=INPUT)
        else:
            yield copy(me, me, 0, source=INPUT, into=work, count=p)
            yield from (stage(k, False) for k in reversed(range(digits)))
        if op == "reduce_scatter":
            yield copy(me, me, me, to=0, source=work)
        else:
            yield from (stage(k, True) for k in range(digits))

    return Program("bcube", operation, p, p, steps, num_scratch=p if work is SCRATCH else 0)


def supports(operation: str, num_ranks: int, *, base: int | None = None) -> bool | No:
    """Powers of the base."""
    found = stages(num_ranks, base)
    if found is None:
        return No(f"{num_ranks} ranks are no power of base {base}")
    return few_enough(num_ranks, found[0] - 1) and only(OPERATIONS, operation)


def cost(operation: str, num_ranks: int, *, root: int = 0, base: int | None = None) -> Cost:
    """log_B P steps of B − 1 messages for each phase: reduce-scatter, all-gather."""
    p = num_ranks
    b, digits = stages(p, base) or (2, 0)
    phases = 2 if operation == "all_reduce" else 1
    share = Fraction(p - 1, p)
    messages = phases * digits * (b - 1)
    return Cost(phases * digits, messages, phases * share, Fraction(0) if "gather" in operation else share)
