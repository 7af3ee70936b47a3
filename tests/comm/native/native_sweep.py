"""The space of native operations: place × algorithm × operation × root × size × dtype × operator × memory.

`everything` lists the whole product, `covering` a part in which every two values that go together meet.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import torch
from native_values import DTYPES

from paceline import _core, collectives
from paceline.collectives.verification.sweep import variants
from paceline.comm.native.codes import DTYPE_CODES, OP_CODES, REDUCIBLE
from paceline.schedule import contract
from paceline.spec import Spec
from paceline.types import ReduceOp

OWN = "own"
"""The fabric's own protocol instead of a program."""
SHARES = "direct(shares=…)"
MIXED = (
    "a", "ab", "aa", "aab", "aba", "abb", "abab", "aabc", "aaab", "baaab", "aabbb", "aabbcc", "abcabc",
    "aaaaab", "aaabbbc", "abababa", "aabbccdd", "aaaabbbb", "abababab", "aaaaaaab",
)  # fmt: skip
ROOTS = ("first", "middle", "last")
SIZES = ("none", "one", "prime", "ragged", "uneven", "eager", "slice", "slices")
LARGE = ("slice", "slices")
SLICE_BYTES = 256 << 10
"""Messages of programs travel in slices of this size."""


@dataclass(frozen=True)
class Case:
    """One operation on one World.

    `memory`: "private"; "allocated" by the engine; "in place", as the contract says.
    """

    fabric: str
    hosts: str
    algorithm: str
    operation: str
    root: str
    size: str
    dtype: str
    op: ReduceOp
    memory: str

    @property
    def num_ranks(self) -> int:
        return len(self.hosts)

    @property
    def root_rank(self) -> int:
        return {"first": 0, "middle": self.num_ranks // 2, "last": self.num_ranks - 1}[self.root]

    @property
    def torch_dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    def counts(self) -> Any:
        """As `contract.layout` takes them, in elements."""
        p, item = self.num_ranks, self.torch_dtype.itemsize
        if self.size == "uneven":
            if self.operation == "all_to_all":
                twice = 1 if self.memory == "in place" else 2  # there what is sent and what comes lie alike
                return tuple(tuple(11 * ((s + twice * d) % 4) for d in range(p)) for s in range(p))
            return tuple(211 * ((3 * r + 1) % 4) for r in range(p))
        each = SLICE_BYTES // item
        sizes = {
            "none": 0,
            "one": 1,
            "prime": 1021,
            "ragged": 5 * p + 1,
            "eager": self._eager_bytes() // item + 1,
            "slice": each + 1,
            "slices": p * each + p + 1,
        }
        return sizes[self.size]

    def _eager_bytes(self) -> int:
        """Up to here the fabric's own protocols take one step; csrc/core/network/direct.cpp and mixed.cpp."""
        p, reduces = self.num_ranks, self.operation in contract.REDUCING
        if self.fabric == "shm":
            is_same_for_all = self.operation in ("broadcast", "all_gather")
            limit = _core.eager_reduce_bytes(p) if reduces else _core.eager_exchange_bytes(p, is_same_for_all)
        elif self.fabric == "mixed":
            limit = 64 << 10
        else:
            limit = 128 << 10 if p <= 2 else 8 << 10 if p <= 4 else 2 << 10
        return limit // p if self.operation == "reduce_scatter" else limit


def places() -> list[tuple[str, str]]:
    """Every (fabric, hosts), P = 1 … 8."""
    apart = "abcdefgh"
    found = [(fabric, apart[:p]) for fabric in ("shm", "tcp") for p in range(1, 9)]
    return found + [("mixed", hosts) for hosts in MIXED]


def algorithms(fabric: str, num_ranks: int) -> list[tuple[str, str]]:
    """Every (algorithm, operation) that `fabric` runs on this many ranks."""
    found = [(OWN, operation) for operation in contract.OPERATIONS if operation not in contract.V_FORMS]
    if fabric != "tcp":
        return found
    found.append((SHARES, "all_reduce"))
    for name, module in collectives.algorithms().items():
        for operation in module.OPERATIONS:
            for options in variants(module) if operation not in contract.V_FORMS else ():
                if collectives.supports(name, operation, num_ranks, **options):
                    found.append((str(Spec(name, options)), operation))
    return found


def sizes(operation: str) -> list[str]:
    if operation == "barrier":
        return ["none"]
    is_whole = operation in contract.WHOLE
    left_out = [] if is_whole else ["slices"]
    if is_whole or operation in ("gather", "scatter"):
        left_out.append("uneven")
    return [size for size in SIZES if size not in left_out]


def operators(operation: str, dtype: str) -> list[ReduceOp]:
    if operation not in contract.REDUCING or operation == "barrier":
        return [ReduceOp.SUM]
    code = DTYPE_CODES[getattr(torch, dtype)]
    return [op for op in ReduceOp if REDUCIBLE[code][OP_CODES[op]]]


def memories(algorithm: str, operation: str) -> list[str]:
    if operation == "barrier":
        return ["private"]
    if algorithm not in (OWN, SHARES):
        return ["private", "in place"]
    # The communicator's whole-buffer operations are always in place; an exchange of everything never.
    never = operation in contract.WHOLE or operation == "all_to_all"
    return ["private", "allocated"] if never else ["private", "allocated", "in place"]


@dataclass(frozen=True)
class Program:
    """An algorithm for an operation at one place, and what its cases may differ in."""

    fabric: str
    hosts: str
    algorithm: str
    operation: str

    def choices(self) -> list[list[Any]]:
        """Values of root, size, (dtype, operator) and memory: all of them go together."""
        operation = self.operation
        roots = list(ROOTS if len(self.hosts) > 2 else ("first", "last")[: len(self.hosts)])
        dtypes = DTYPES if operation != "barrier" else ("uint8",)
        return [
            roots if operation in contract.ROOTED else ["first"],
            sizes(operation),
            [(dtype, op) for dtype in dtypes for op in operators(operation, dtype)],
            memories(self.algorithm, operation),
        ]

    def case(self, root: str, size: str, pair: tuple[str, ReduceOp], memory: str) -> Case:
        return Case(self.fabric, self.hosts, self.algorithm, self.operation, root, size, *pair, memory)


def programs(fabric: str, hosts: str) -> list[Program]:
    return [Program(fabric, hosts, *each) for each in algorithms(fabric, len(hosts))]


def everything(fabric: str, hosts: str) -> Iterator[Case]:
    """Every case of a place; of large ones, every dtype with one operator, in turn.

    The loops that combine are the same for all sizes beyond a block of 512 elements.
    """
    turn = 0
    for program in programs(fabric, hosts):
        roots, every_size, pairs, places_in_memory = program.choices()
        operators_of = {dtype: [o for d, o in pairs if d == dtype] for dtype, _ in pairs}
        for root, size, memory in product(roots, every_size, places_in_memory):
            turn += 1
            for dtype, ops in operators_of.items():
                for op in [ops[turn % len(ops)]] if size in LARGE else ops:
                    yield program.case(root, size, (dtype, op), memory)


def covering(seed: int, *, tries: int = 12) -> list[Case]:
    """Cases in which every two values of two dimensions meet that meet in any case; ordered by place.

    Greedy: what is still missing is completed at random, and the best of some completions is kept.
    """
    rng = random.Random(seed)
    where: dict[Any, list[Program]] = {}
    for place in places():
        for program in programs(*place):
            for pair in _pairs_of(program):
                where.setdefault(pair, []).append(program)
    todo = sorted(where, key=repr)
    rng.shuffle(todo)
    missing, chosen = set(todo), []
    for pair in todo:
        if pair in missing:
            candidates = [_complete(pair, rng.choice(where[pair]), rng) for _ in range(tries)]
            best = max(candidates, key=lambda c: len(missing.intersection(_pairs(c))))
            chosen.append(best)
            missing.difference_update(_pairs(best))
    assert not missing
    order = {place: k for k, place in enumerate(places())}
    return sorted(chosen, key=lambda c: order[c.fabric, c.hosts])


# The dimensions of pairs: 0 the place; 1 the program; 2 root; 3 size; 4 dtype; 5 operator; 6 memory.


def _complete(pair: Any, program: Program, rng: random.Random) -> Case:
    fixed = dict(pair)
    roots, every_size, pairs, places_in_memory = program.choices()
    fitting = [(d, o) for d, o in pairs if fixed.get(4, d) == d and fixed.get(5, o) == o]
    return program.case(
        fixed.get(2) or rng.choice(roots),
        fixed.get(3) or rng.choice(every_size),
        rng.choice(fitting),
        fixed.get(6) or rng.choice(places_in_memory),
    )


def _values(program: Program | Case) -> tuple[Any, Any]:
    return (program.fabric, program.hosts), (program.fabric, program.algorithm, program.operation)


def _pairs(case: Case) -> list[Any]:
    rest = (case.root, case.size, case.dtype, case.op, case.memory)
    return list(combinations(enumerate((*_values(case), *rest)), 2))


def _pairs_of(program: Program) -> Iterator[Any]:
    roots, every_size, pairs, places_in_memory = program.choices()
    dimensions: list[list[Any]] = [[value] for value in _values(program)]
    dimensions += [
        roots,
        every_size,
        *(list(dict.fromkeys(x)) for x in zip(*pairs, strict=True)),
        places_in_memory,
    ]
    for (i, one), (j, other) in combinations(enumerate(dimensions), 2):
        yield from (((i, a), (j, b)) for a, b in (pairs if (i, j) == (4, 5) else product(one, other)))
