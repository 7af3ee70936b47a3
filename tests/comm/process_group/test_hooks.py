"""Hooks around collectives, from torch 2.14 on: ours go by way of torch's dispatcher while there are any."""

from __future__ import annotations

import json
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from c10d_ranks import run

from paceline.torch_versions import HAS_PYTHON_BACKENDS, cpp

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not HAS_PYTHON_BACKENDS, reason="hooks around collectives came with torch 2.14"),
]


def every_call(rank: int, size: int) -> list[str]:
    """Make one call of each kind; returns the names that hooks must be called with."""
    t, whole = torch.ones(4), torch.ones(4 * size)
    parts = [torch.empty(4) for _ in range(size)]
    dist.all_reduce(t)
    dist.broadcast(t, 0)
    dist.reduce(t, 0)
    dist.all_gather(parts, t)
    dist.all_gather_single(whole, t)
    dist.reduce_scatter(t, parts)
    dist.reduce_scatter_single(t, whole)
    dist.all_to_all(parts, [torch.ones(4) for _ in range(size)])
    dist.all_to_all_single(torch.empty(4 * size), whole)
    dist.gather(t, parts if rank == 0 else None)
    dist.scatter(t, parts if rank == 0 else None)
    dist.barrier()
    names = "ALLREDUCE BROADCAST REDUCE ALLGATHER ALLGATHER REDUCE_SCATTER REDUCE_SCATTER"
    names += " ALLTOALL ALLTOALL GATHER SCATTER BARRIER"
    if rank == 0:
        dist.send(t, 1)
        names += " SEND"
    elif rank == 1:
        assert dist.recv(t) == 0
        names += " RECV"
    return names.split()


def hooked(rank: int, size: int) -> None:
    world = dist.group.WORLD
    assert world is not None
    before, after = [], []
    world.register_pre_hook(1, lambda called: before.append((called.name.name, called.op_id)))
    world.register_post_hook(1, lambda called: after.append((called.name.name, called.op_id)))
    expected = every_call(rank, size)
    assert [name for name, _ in before] == expected and after == before
    assert len({number for _, number in before}) == len(expected)
    world.unregister_pre_hook(1)
    world.unregister_post_hook(1)
    every_call(rank, size)
    assert len(before) == len(after) == len(expected)


@pytest.mark.parametrize("network", [False, True], ids=["shm", "tcp"])
def test_hooks_see_every_call_once(network: bool) -> None:
    run(2, hooked, network=network)


def works(rank: int, size: int) -> None:
    world = dist.group.WORLD
    assert world is not None
    world.register_pre_hook(1, lambda called: None)
    tensor = torch.ones(4)
    work = dist.all_reduce(tensor, async_op=True)
    assert work is not None
    for _ in range(1000):
        if work.is_completed():
            break
        time.sleep(0.01)
    assert work.is_completed() and work.is_success() and torch.equal(work.result()[0], torch.full((4,), 2.0))
    other = torch.full((2,), 3.0)
    with dist._coalescing_manager(device=torch.device("cpu")):
        dist.all_reduce(tensor)
        dist.all_reduce(other)
    assert torch.equal(tensor, torch.full((4,), 4.0)) and torch.equal(other, torch.full((2,), 6.0))
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    model(torch.full((1, 2), float(rank))).sum().backward()
    gradient = model.module.weight.grad
    assert gradient is not None and torch.equal(gradient, torch.full((2, 2), 0.5))


def test_works_of_a_group_with_hooks_are_whole() -> None:
    run(2, works)


def recorded(rank: int, size: int) -> None:
    world = dist.group.WORLD
    assert world is not None
    recorder = cpp.FlightRecorderHook.attach(world)
    dist.all_reduce(torch.ones(3, 2))
    dist.broadcast(torch.ones(5), 0)
    entries = json.loads(cpp._dump_fr_trace_json())["entries"]
    assert [(e["profiling_name"], e["input_sizes"]) for e in entries] == [
        ("c10d:allreduce", [[3, 2]]),
        ("c10d:broadcast", [[5]]),
    ]
    recorder.remove()


def test_the_flight_recorder_sees_our_collectives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "100")
    run(2, recorded)


def checked(rank: int, size: int) -> None:
    world = dist.group.WORLD
    assert world is not None
    check = cpp.NanCheckHook.attach(world)
    dist.all_reduce(torch.ones(2))
    with pytest.raises(RuntimeError, match=r"(?i)nan"):
        dist.all_reduce(torch.full((2,), float("nan")))
    check.remove()


def test_the_check_for_nan_sees_our_collectives() -> None:
    run(2, checked)


def timeouts(rank: int, size: int) -> None:
    dist.set_timeout(timedelta(seconds=1))
    if rank == 0:
        with pytest.raises(RuntimeError, match="timeout has passed"):
            dist.all_reduce(torch.ones(1))
        dist.distributed_c10d._get_default_store().set("over", "")
    else:
        dist.distributed_c10d._get_default_store().wait(["over"], timedelta(seconds=30))


def test_the_timeout_can_be_set() -> None:
    run(2, timeouts)
