"""Every shipped program, case by case: for `paceline schedule verify --all`, and for tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from types import ModuleType
from typing import Any

import numpy as np

from paceline import collectives
from paceline.errors import ScheduleError
from paceline.schedule.contract import ROOTED, V_FORMS
from paceline.schedule.cost import count
from paceline.schedule.lowering.lower import lower
from paceline.schedule.program import Program
from paceline.schedule.verification.verify import verify


@dataclass(frozen=True)
class Case:
    """One program that Paceline ships."""

    algorithm: str
    operation: str
    num_ranks: int
    root: int
    options: dict[str, Any]  # as `collectives.build` takes them

    def __str__(self) -> str:
        options = "".join(f", {k} {v}" for k, v in self.options.items())
        return f"{self.algorithm} {self.operation}, {self.num_ranks} ranks, root {self.root}{options}"

    def build(self) -> Program:
        """Build its program with `collectives.build`."""
        return collectives.build(
            self.algorithm, self.operation, self.num_ranks, root=self.root, **self.options
        )


def variants(module: ModuleType) -> Sequence[dict[str, Any]]:
    """Sets of options that an algorithm is tried with."""
    found: Sequence[dict[str, Any]] = getattr(module, "VARIANTS", ({},))
    return found


def cases(
    ranks: Sequence[int],
    *,
    algorithms: Sequence[str] | None = None,
    operations: Sequence[str] | None = None,
) -> Iterator[Case]:
    """Every algorithm × operation × variant × number of ranks × root that is supported."""
    for name in collectives.names() if algorithms is None else algorithms:
        module = collectives.find(name)
        for operation in module.OPERATIONS:
            if operations is not None and operation not in operations:
                continue
            for p in ranks:
                for options in variants(module):
                    if collectives.supports(name, operation, p, **options):
                        for root in range(p) if operation in ROOTED else (0,):
                            yield Case(name, operation, p, root, options)


@dataclass
class Summary:
    """What `verify_all` did.

    `programs`: cases. `same`: those of them whose steps are equal to those of another operation's program
    (the v-forms), which is proved once. `lowered`: lowered forms proved; `executable`: those of them that the
    C++ executor runs, while the others are modelled only. `instructions`, `messages`, `dependencies`: of all
    lowered forms together. `failures`: (case, reason).
    """

    programs: int = 0
    same: int = 0
    lowered: int = 0
    executable: int = 0
    instructions: int = 0
    messages: int = 0
    dependencies: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)


def verify_case(case: Case, summary: Summary, *, twins: bool = False) -> None:
    """Compare a program's claimed cost with the counted one, and prove its four lowered forms.

    `twins`: a v-form whose steps equal those of the plain operation is not proved again.
    """
    summary.programs += 1
    try:
        program = case.build()
        _check_claim(case, program)
        if twins and _is_twin(case, program):
            summary.same += 1
            return
        for in_place in (False, True):
            for zero_copy in (False, True):
                proved = verify(lower(program, in_place=in_place, zero_copy=zero_copy))
                summary.lowered += proved.forms
                summary.executable += proved.executable_forms
                summary.instructions += proved.instructions
                summary.messages += proved.messages
                summary.dependencies += proved.dependencies
    except ScheduleError as error:
        summary.failures.append((str(case), str(error)))
    except Exception as error:  # a plug-in may fail in any way; the others are proved all the same
        summary.failures.append((str(case), f"{type(error).__name__}: {error}"))


def _check_claim(case: Case, program: Program) -> None:
    claim = collectives.cost(case.algorithm, case.operation, case.num_ranks, root=case.root, **case.options)
    if count(program) != claim:
        raise ScheduleError(f"{program}: claims {claim}, counted {count(program)}")


def _is_twin(case: Case, program: Program) -> bool:
    """Whether a v-form has the same steps as the plain operation."""
    base = V_FORMS.get(case.operation)
    if base is None or base not in collectives.find(case.algorithm).OPERATIONS:
        return False
    twin = replace(case, operation=base).build()
    if replace(program, operation=twin.operation, make_steps=twin.make_steps) != twin:
        return False
    steps = zip_longest(program.steps(), twin.steps())
    return all(
        a is not None and b is not None and all(map(np.array_equal, a.columns(), b.columns()))
        for a, b in steps
    )


def verify_all(
    ranks: Sequence[int],
    *,
    algorithms: Sequence[str] | None = None,
    operations: Sequence[str] | None = None,
    progress: Callable[[Case], None] | None = None,
) -> Summary:
    """Prove everything shipped for these numbers of ranks; `progress` is called before each case."""
    summary = Summary()
    for case in cases(ranks, algorithms=algorithms, operations=operations):
        if progress is not None:
            progress(case)
        base = V_FORMS.get(case.operation)
        verify_case(case, summary, twins=operations is None or base in operations)
    return summary
