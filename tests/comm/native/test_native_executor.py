"""Every operation of the native fabric, over shared memory, TCP and both, against what it means: bit for bit.

Programs of `paceline.collectives` are held against the interpreter, whose order of reductions is canonical.
The fabrics' own protocols are held against the definition: contributions meet in the order of ranks; where
hosts have several ranks, first within every host, then in the order of hosts.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

import pytest
import torch
from native_check import check
from native_sweep import Case, covering, everything, places
from one_process import World
from shm_ranks import run

from paceline import collectives
from paceline.types import ReduceOp

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("processes")]
FABRICS = pytest.mark.parametrize("fabric", ["shm", "tcp", "mixed"])


def check_all(cases: Iterable[Case]) -> None:
    for place, here in groupby(cases, key=lambda case: (case.fabric, case.hosts)):
        with World(*place) as world:
            for case in here:
                check(world, case)


@FABRICS
def test_every_two_values_together(fabric: str) -> None:
    check_all(case for case in covering(seed=1) if case.fabric == fabric)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3, 4])
@FABRICS
def test_more_combinations(fabric: str, seed: int) -> None:
    check_all(case for case in covering(seed) if case.fabric == fabric)


@pytest.mark.exhaustive
@pytest.mark.parametrize("place", places(), ids="-".join)
def test_everything(place: tuple[str, str]) -> None:
    check_all(everything(*place))


def processes_body(comm: object) -> int:
    """Every algorithm once more from processes of their own, by name."""
    checked = 0
    for name in collectives.names():
        if not collectives.supports(name, "all_reduce", comm.size):
            continue
        for n in (1021, 300_007):
            tensor = torch.arange(n, dtype=torch.int64) * (comm.rank + 1)
            comm.all_reduce(tensor, op=ReduceOp.SUM, algorithm=name).wait()
            assert torch.equal(tensor, torch.arange(n) * (comm.size * (comm.size + 1) // 2)), (name, n)
            checked += 1
    return checked


def test_algorithms_between_processes() -> None:
    assert min(run(3, processes_body, network=True)) > 10
