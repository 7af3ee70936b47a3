"""Break shipped schedules one operation at a time: the verifier must notice, or the result be the same.

The ordinary run takes a sample of every (algorithm, operation) at P = 2 … 9; the slow one takes all.
"""

from __future__ import annotations

import copy as copying
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from rehearse import rehearse

from paceline import collectives
from paceline.collectives.verification.sweep import Case, cases
from paceline.errors import ScheduleError
from paceline.schedule import contract
from paceline.schedule.interpret import interpret
from paceline.schedule.lowering.lower import lower
from paceline.schedule.lowering.lowered import Lowered
from paceline.schedule.program import COPY, Op, Program, step_of
from paceline.schedule.verification.verify import verify

Steps = list[list[Op]]


def cases_of(name: str) -> Iterator[Case]:
    """One root per P; the v-forms are the same programs."""
    for case in cases(range(2, 10), algorithms=[name]):
        is_chosen = case.operation not in contract.ROOTED or case.root == case.num_ranks // 2
        if case.operation not in contract.V_FORMS and is_chosen:
            yield case


def program_of(original: Program, steps: Steps) -> Program:
    made = tuple(step_of(ops) for ops in steps)
    return replace(original, make_steps=lambda: made)


def mutants(program: Program, steps: Steps, draw: random.Random) -> Iterator[tuple[str, Op, Steps]]:
    """Remove, duplicate or redirect each single operation (in three ways, to a place drawn at random)."""
    p = program.num_ranks
    for t, ops in enumerate(steps):
        for k, op in enumerate(ops):
            others = [r for r in range(p) if r not in (op.dst_rank, op.src_rank)]
            elsewhere = draw.choice(others) if others else op.src_rank
            changed: list[tuple[str, list[Op]]] = [
                ("remove", []),
                ("duplicate", [op, op]),
                ("redirect to", [replace(op, dst_rank=elsewhere)]),
                ("redirect from", [replace(op, src_rank=elsewhere if others else op.dst_rank)]),
            ]
            if program.num_chunks > op.count:
                chunk = (op.dst_chunk + 1) % (program.num_chunks - op.count + 1)
                if chunk != op.dst_chunk:
                    changed.append(("redirect chunk", [replace(op, dst_chunk=chunk)]))
            for kind, instead in changed:
                yield kind, op, [*steps[:t], [*ops[:k], *instead, *ops[k + 1 :]], *steps[t + 1 :]]


def is_accepted(program: Program) -> bool:
    try:
        verify(lower(program))
    except ScheduleError:
        return False
    return True


def inputs_of(program: Program, size: int) -> list:
    draw = np.random.default_rng(11)
    op = contract.base_operation(program.operation)
    counts = 0 if op == "barrier" else size
    lengths = [int(contract.layout(program, r, counts).input_offsets[-1]) for r in range(program.num_ranks)]
    return [draw.integers(-(2**40), 2**40, n) for n in lengths]


def same_result(program: Program, mutant: Program) -> bool:
    size = 3 * program.num_chunks
    inputs = inputs_of(program, size)
    counts = 0 if program.operation == "barrier" else size
    want, got = (interpret(each, inputs, counts=counts) for each in (program, mutant))
    return all(a is b is None or np.array_equal(a, b) for a, b in zip(want, got, strict=True))


def mutate(name: str, sample: int | None) -> Counter[str]:
    """Try mutants of every program of `name`; count kinds of rejected and surviving ones."""
    seen: Counter[str] = Counter()
    draw = random.Random(name)
    for case in cases_of(name):
        program = case.build()
        steps = [step.ops() for step in program.steps()]
        made = list(mutants(program, steps, draw))
        for kind, op, changed in made if sample is None else draw.sample(made, min(sample, len(made))):
            mutant = program_of(program, changed)
            if not is_accepted(mutant):
                seen[f"{kind}: rejected"] += 1
                continue
            what = f"{case}: {kind} {op}"
            assert same_result(program, mutant), f"{what}: accepted, but gives another result"
            assert kind not in ("remove", "redirect chunk"), (
                f"{what}: shipped programs have no idle operation"
            )
            if kind == "duplicate":
                assert op.kind == COPY or program.operation == "barrier", what
            seen[f"{kind}: survived, equivalent"] += 1
    return seen


@pytest.mark.parametrize("name", collectives.names())
def test_sampled_mutants_are_rejected(name: str) -> None:
    seen = mutate(name, sample=12)
    rejected = sum(n for kind, n in seen.items() if kind.endswith("rejected"))
    assert rejected > 0
    print(name, dict(seen))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", collectives.names())
def test_all_mutants_are_rejected(name: str) -> None:
    print(name, dict(mutate(name, sample=None)))


def without_dependencies(lowered: Lowered) -> Iterator[tuple[int, int, int]]:
    """(rank, instruction, dependency) of every single dependency."""
    for rank, mine in enumerate(lowered.instructions):
        for index, i in enumerate(mine):
            yield from ((rank, index, d) for d in i.deps)


def drop_dependencies(name: str, sample: int | None) -> Counter[str]:
    seen: Counter[str] = Counter()
    draw = random.Random(name)
    for case in cases_of(name):
        for in_place in (False, True):
            for zero_copy in (False, True):
                lowered = lower(case.build(), in_place=in_place, zero_copy=zero_copy)
                every = list(without_dependencies(lowered))
                for rank, index, d in (
                    every if sample is None else draw.sample(every, min(sample, len(every)))
                ):
                    i = lowered.instructions[rank][index]
                    i.deps.remove(d)
                    try:
                        verify(lowered)
                        seen["survived"] += 1
                        print("survived:", lowered, rank, index, i, "without", d)
                    except ScheduleError as error:
                        assert "nothing orders the two" in str(error)
                        seen["rejected"] += 1
                    i.deps.append(d)
                    i.deps.sort()
    return seen


@pytest.mark.parametrize("name", collectives.names())
def test_every_dependency_is_needed(name: str) -> None:
    """The dependencies of the lowered program are reduced as far as they go: each one prevents a race."""
    assert drop_dependencies(name, sample=3)["survived"] == 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", collectives.names())
def test_every_single_dependency_is_needed(name: str) -> None:
    seen = drop_dependencies(name, sample=None)
    print(name, dict(seen))
    assert seen["survived"] == 0


@pytest.mark.parametrize("name", collectives.names())
def test_dropped_and_doubled_instructions_are_rejected(name: str) -> None:
    """Also on the lowered side: any one instruction left out or done twice."""
    draw = random.Random(name)
    for case in cases_of(name):
        lowered = lower(case.build(), zero_copy=bool(case.num_ranks % 2))
        places = [(r, k) for r, mine in enumerate(lowered.instructions) for k in range(len(mine))]
        for rank, index in draw.sample(places, min(4, len(places))):
            for instead in (0, 2):
                mutant = copying.deepcopy(lowered)
                mine = mutant.instructions[rank]
                mine[index : index + 1] = [copying.deepcopy(mine[index]) for _ in range(instead)]
                for i in mine[index + instead :]:
                    i.deps = [d + instead - 1 if d > index else d for d in i.deps if d != index or instead]
                try:
                    verify(mutant)
                except ScheduleError:
                    continue
                size = 3 * mutant.num_chunks if mutant.operation != "barrier" else 0
                inputs = inputs_of(case.build(), size)
                want, got = (rehearse(each, inputs, counts=size) for each in (lowered, mutant))
                for a, b in zip(want, got, strict=True):
                    assert (a is b is None) or np.array_equal(a, b), f"{mutant}: {mine[index]} × {instead}"
                assert instead == 2 and mine[index].verb in ("copy", "reclaim"), f"{mutant}: {mine[index]}"
