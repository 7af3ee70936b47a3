"""Random sequences of operations on several groups at once, waited for in any order, against plain values.

Over shared memory, TCP and both: groups of all ranks, in two orders, within a host and across hosts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rank_pool import RankPool

from paceline.train.job import Job

pytestmark = pytest.mark.xdist_group("processes")
GROUPS = ((0, 1, 2), (2, 1, 0), (0, 1), (0, 2), (2, 1))
SIZES = (0, 1, 5, 300, 9000, 70_000)
Made = tuple[Any, torch.Tensor | None, torch.Tensor | None]
"""A work, what it leaves, and what that must be."""


class Step:
    """One operation of one group, as a member sees it: rank r brings values of its own."""

    def __init__(self, group: Any, number: int, n: int, allocated: bool) -> None:
        self.group, self.number, self.n, self.size, self.rank = group, number, n, group.size, group.rank
        self._make = group.allocate if allocated else lambda k, dtype: torch.zeros(k, dtype=dtype)

    def value(self, rank: int) -> float:
        return float(self.number + 10 * rank)

    def tensor(self, blocks: int = 1, value: float | None = None) -> torch.Tensor:
        made: torch.Tensor = self._make(self.n * blocks, torch.float32)
        return made.fill_(self.value(self.rank) if value is None else value)

    def all(self, value: float) -> torch.Tensor:
        return torch.full((self.n,), value)

    def total(self) -> torch.Tensor:
        return self.all(sum(map(self.value, range(self.size))))

    def every(self) -> torch.Tensor:
        return torch.cat([self.all(self.value(r)) for r in range(self.size)])


def all_reduce(s: Step) -> Made:
    return s.group.all_reduce(t := s.tensor()), t, s.total()


def urgent(s: Step) -> Made:
    return s.group.all_reduce(t := s.tensor(), priority=1), t, s.total()


def reduce(s: Step) -> Made:
    return s.group.reduce(t := s.tensor(), root=s.size - 1), t, s.total() if s.rank == s.size - 1 else None


def reduce_scatter(s: Step) -> Made:
    return s.group.reduce_scatter(t := s.tensor(), s.tensor(s.size)), t, s.total()


def all_gather(s: Step) -> Made:
    return s.group.all_gather(t := s.tensor(s.size), s.tensor()), t, s.every()


def broadcast(s: Step) -> Made:
    return s.group.broadcast(t := s.tensor(), root=s.size - 1), t, s.all(s.value(s.size - 1))


def gather(s: Step) -> Made:
    out = s.tensor(s.size) if s.rank == 0 else None
    return s.group.gather(out, s.tensor(), root=0), out, None if out is None else s.every()


def scatter(s: Step) -> Made:
    source = s.tensor(s.size) if s.rank == 0 else None
    return s.group.scatter(t := s.tensor(), source, root=0), t, s.all(s.value(0))


def all_to_all(s: Step) -> Made:
    return s.group.all_to_all(t := s.tensor(s.size), s.tensor(s.size)), t, s.every()


def barrier(s: Step) -> Made:
    return s.group.barrier(), None, None


def send(s: Step) -> Made | None:
    """The first rank sends, the last one receives, others do nothing."""
    if s.rank == 0:
        return s.group.send(s.tensor(), s.size - 1, tag=s.number), None, None
    return receive(s, 0) if s.rank == s.size - 1 else None


def receive(s: Step, src: int) -> Made:
    return s.group.recv(t := s.tensor(value=-1), src, tag=s.number), t, s.all(s.value(src))


OPERATIONS: tuple[Callable[[Step], Made | None], ...] = (
    all_reduce, urgent, reduce, reduce_scatter, all_gather, broadcast, gather, scatter, all_to_all, barrier,
    send,
)  # fmt: skip
STEP = st.tuples(
    st.integers(0, len(GROUPS) - 1),
    st.sampled_from(["round", *(f.__name__ for f in OPERATIONS)]),
    st.sampled_from(SIZES),
    st.booleans(),  # allocated
    st.booleans(),  # waited for at once
)


def begin(name: str, step: Step) -> list[Made]:
    if name != "round":
        made = next(f for f in OPERATIONS if f.__name__ == name)(step)
        return [] if made is None else [made]
    # Every rank sends to its neighbour; some are ready to receive before anything can have come.
    made = [receive(step, (step.rank - 1) % step.size)] if step.rank % 2 else []
    made.append((step.group.send(step.tensor(), (step.rank + 1) % step.size, tag=step.number), None, None))
    return made if step.rank % 2 else [*made, receive(step, (step.rank - 1) % step.size)]


def sequence_body(job: Job, steps: list[Any], seed: int) -> int:
    comm: Any = job.comm
    groups = [comm.split(list(ranks)) for ranks in GROUPS]
    pending = []
    for number, (index, name, n, allocated, at_once) in enumerate(steps):
        if groups[index] is None:
            continue
        made = begin(name, Step(groups[index], number, n, allocated))
        for work, _, _ in made if at_once and name != "send" else ():
            work.wait()
        pending += [(number, *each) for each in made]
    random.Random(seed + comm.rank).shuffle(pending)  # every rank waits in an order of its own
    for number, work, result, want in pending:
        work.wait()
        if want is not None:
            assert torch.equal(result, want), (number, steps[number], result[:3], want[:3])
    comm.barrier().wait()
    for group in groups:
        if group is not None:
            group.close()
    return len(pending)


@pytest.fixture(scope="module", params=["shm", "tcp", "mixed"])
def pool(request: pytest.FixtureRequest) -> Iterator[RankPool]:
    found = RankPool(3, hosts={"shm": "aaa", "tcp": "abc", "mixed": "aab"}[request.param])
    yield found
    found.close()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEP, min_size=1, max_size=14), seed=st.integers(0, 1000))
def test_any_sequence_on_several_groups(pool: RankPool, steps: list[Any], seed: int) -> None:
    pool.run(sequence_body, steps, seed)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEP, min_size=10, max_size=40), seed=st.integers(0, 1000))
def test_long_sequences_on_several_groups(pool: RankPool, steps: list[Any], seed: int) -> None:
    pool.run(sequence_body, steps, seed)
