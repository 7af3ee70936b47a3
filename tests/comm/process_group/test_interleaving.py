"""Asynchronous operations on three overlapping groups in random order: no deadlock, right results."""

from __future__ import annotations

import random
import time

import pytest
import torch
import torch.distributed as dist
from c10d_ranks import run

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("processes"), pytest.mark.timeout(280)]

ROUNDS = 1000
OPERATIONS = ("all_reduce", "broadcast", "all_gather", "reduce_scatter", "barrier", "ring")


def interleave(rank: int, size: int, rounds: int) -> int:
    members = [[0, 1, 2], [0, 1], [1, 2]]
    groups = [dist.new_group(m) for m in members]
    mine = [g for g in range(3) if rank in members[g]]
    started = 0
    for turn in range(rounds):
        # Each group has its own order of calls, the same on its members; how a rank mixes them is its own.
        plans = {}
        for g in mine:
            shared = random.Random(turn * 3 + g)
            count = shared.randint(1, 4)
            plans[g] = [(shared.choice(OPERATIONS), shared.choice((1, 300, 40_000))) for _ in range(count)]
        own = random.Random(turn * 31 + rank)
        checks = []
        while plans:
            g = own.choice(sorted(plans))
            name, numel = plans[g].pop(0)
            checks.append(start(name, numel, groups[g], members[g], rank))
            started += 1
            if not plans[g]:
                del plans[g]
            if own.random() < 0.05:
                time.sleep(0.001)
        own.shuffle(checks)  # waited for in another order than they were started
        for works, check in checks:
            for work in works:
                if own.random() < 0.3:
                    work.get_future().wait()
                else:
                    work.wait()
            check()
    return started


def start(name: str, numel: int, group: dist.ProcessGroup, members: list[int], rank: int):
    size = len(members)
    t = torch.full((numel,), float(rank))
    if name == "all_reduce":
        return [dist.all_reduce(t, group=group, async_op=True)], lambda: expect(t, sum(members))
    if name == "broadcast":
        work = dist.broadcast(t, src=members[-1], group=group, async_op=True)
        return [work], lambda: expect(t, members[-1])
    if name == "all_gather":
        outs = [torch.empty(numel) for _ in members]
        work = dist.all_gather(outs, t, group=group, async_op=True)
        return [work], lambda: [expect(o, m) for o, m in zip(outs, members, strict=True)]
    if name == "reduce_scatter":
        whole = torch.full((numel * size,), float(rank))
        work = dist.reduce_scatter_single(t, whole, group=group, async_op=True)
        return [work], lambda: expect(t, sum(members))
    if name == "barrier":
        return [dist.barrier(group=group, async_op=True)], lambda: None
    at = members.index(rank)
    box = torch.empty(numel)
    works = [
        dist.isend(t, group=group, group_dst=(at + 1) % size),
        dist.irecv(box, group=group, group_src=(at - 1) % size),
    ]
    return works, lambda: expect(box, members[(at - 1) % size])


def expect(t: torch.Tensor, value: float) -> None:
    assert bool((t == value).all()), (t[0].item(), t[-1].item(), value)


@pytest.mark.parametrize("network", [False, True], ids=["shm", "tcp"])
def test_some_interleavings(network: bool) -> None:
    assert min(run(3, interleave, 40, network=network, limit_s=120)) > 40


@pytest.mark.slow
@pytest.mark.parametrize("network", [False, True], ids=["shm", "tcp"])
def test_a_thousand_interleavings(network: bool) -> None:
    assert min(run(3, interleave, ROUNDS, network=network, limit_s=250)) > ROUNDS


def churn(rank: int, size: int, count: int) -> int:
    from paceline.comm.native.communicator import engine

    for i in range(count):
        group = dist.new_group([0, 1])
        t = torch.full((10,), float(i))
        work = dist.all_reduce(t, group=group, async_op=True)
        if i % 3:
            work.wait()
        dist.destroy_process_group(group)
    dist.barrier()
    return engine().allocated_bytes


@pytest.mark.slow
def test_a_thousand_groups_leave_nothing_behind() -> None:
    for few, many in zip(run(2, churn, 10), run(2, churn, 1000, limit_s=200), strict=True):
        assert many <= few + (8 << 20)
