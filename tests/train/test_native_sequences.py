"""Random sequences of operations on several groups at once, waited for in any order, against plain sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rank_pool import RankPool

from paceline.train.job import Job

pytestmark = pytest.mark.xdist_group("processes")
GROUPS = ((0, 1, 2), (2, 1, 0), (0, 2), (1, 2))
OPERATIONS = ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "urgent", "send")
SIZES = (1, 5, 300, 9000, 70_000)

STEP = st.tuples(
    st.integers(0, len(GROUPS) - 1),
    st.sampled_from(OPERATIONS),
    st.sampled_from(SIZES),
    st.booleans(),  # allocated
    st.booleans(),  # waited for at once
)


def sequence_body(job: Job, steps: list[Any], backwards: bool) -> int:
    comm: Any = job.comm
    groups = [comm.split(list(ranks)) for ranks in GROUPS]
    pending = []
    for number, (index, operation, n, allocated, at_once) in enumerate(steps):
        group, ranks = groups[index], GROUPS[index]
        if group is None:
            continue
        make = group.allocate if allocated else lambda k, dtype: torch.zeros(k, dtype=dtype)
        value = {r: float(number + 10 * i) for i, r in enumerate(ranks)}
        mine, total, p = value[comm.rank], sum(value.values()), len(ranks)
        one, whole = make(n, torch.float32).fill_(mine), make(n * p, torch.float32).fill_(mine)
        if operation in ("all_reduce", "urgent"):
            more = {"priority": 1} if operation == "urgent" and comm.fabric == "native" else {}
            work, result, want = group.all_reduce(one, **more), one, torch.full((n,), total)
        elif operation == "reduce_scatter":
            work, result, want = group.reduce_scatter(one, whole), one, torch.full((n,), total)
        elif operation == "all_gather":
            want = torch.tensor([value[r] for r in ranks]).repeat_interleave(n)
            work, result = group.all_gather(whole, one), whole
        elif operation == "broadcast":
            work, result, want = group.broadcast(one, root=p - 1), one, torch.full((n,), value[ranks[-1]])
        elif group.rank == 0:
            work, result, want = group.send(one, p - 1, tag=number), one, one
        elif group.rank == p - 1:
            work, result, want = group.recv(one, 0, tag=number), one, torch.full((n,), value[ranks[0]])
        else:
            continue
        if at_once and operation != "send":
            work.wait()
        pending.append((number, work, result, want))
    for number, work, result, want in reversed(pending) if backwards else pending:
        work.wait()
        assert torch.equal(result, want), (number, steps[number], result[:3], want[:3])
    comm.barrier().wait()
    for group in groups:
        if group is not None:
            group.close()
    return len(pending)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEP, min_size=1, max_size=14), backwards=st.booleans())
def test_any_sequence_on_several_groups(three: RankPool, steps: list[Any], backwards: bool) -> None:
    if three.fabric != "native":
        pytest.skip("groups of the torch fabric are slow to make")
    three.run(sequence_body, steps, backwards)
