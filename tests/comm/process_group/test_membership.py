"""Groups of some members, and the same group with other members."""

from __future__ import annotations

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from c10d_ranks import run
from torch import nn

from paceline.errors import CommError, ConfigError, PeerLost
from paceline.torch_versions import HAS_PYTHON_BACKENDS

pytestmark = pytest.mark.distributed
needs_reconfigure = pytest.mark.skipif(
    not HAS_PYTHON_BACKENDS, reason="init_process_group(enable_reconfigure=True) came with torch 2.14"
)


def total(group: dist.ProcessGroup, value: float) -> float:
    tensor = torch.full((3,), value)
    group.allreduce([tensor]).wait()
    return tensor[0].item()


def splits(rank: int, size: int) -> None:
    world = dist.group.WORLD
    assert world is not None
    part = world.split_group([2, 0] if rank != 1 else [1], group_desc="a part")
    assert part is not None and part.group_desc == "a part" and part.group_name != world.group_name
    if rank == 1:
        assert (part.rank(), part.size(), total(part, 5.0)) == (0, 1, 5.0)
    else:
        assert (part.rank(), part.size(), total(part, rank + 1.0)) == ({2: 0, 0: 1}[rank], 2, 4.0)
    assert (world.split_group([0, 1]) is None) == (rank == 2)
    assert total(world, 1.0) == 3.0, "the whole group goes on"
    with pytest.raises(ConfigError, match="only groups for CPU tensors"):
        world.split_group([0, 1, 2], device_types=[torch.device("cuda")])


@pytest.mark.parametrize("network", [False, True], ids=["shm", "tcp"])
def test_split_group(network: bool) -> None:
    run(3, splits, network=network)


def waiting(rank: int, size: int) -> tuple[dist.Store, list[str]]:
    """Make the group again so that it waits for its members; returns the store and their handles."""
    store = dist.distributed_c10d._get_default_store()
    dist.destroy_process_group()
    dist.init_process_group(
        "paceline",
        store=store,
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=20),
        enable_reconfigure=True,
    )
    store.set(f"handle/{rank}", dist._get_reconfigure_handle())
    return store, [store.get(f"handle/{r}").decode() for r in range(size)]


def loses_one(rank: int, size: int) -> None:
    _, handles = waiting(rank, size)
    assert dist._supports_reconfigure()
    with pytest.raises(CommError, match="enable_reconfigure=True and is not connected yet"):
        dist.all_reduce(torch.ones(1))
    dist._reconfigure(1, handles).wait()
    tensor = torch.ones(4)
    dist.all_reduce(tensor)
    assert tensor[0] == size == dist.get_world_size()
    with pytest.raises(ConfigError, match="do not name this member"):
        dist._reconfigure(2, [h for r, h in enumerate(handles) if r != rank])
    if rank == 1:
        os._exit(9)
    with pytest.raises(PeerLost):
        dist.all_reduce(tensor)
    dist._reconfigure(3, [handles[2], handles[0]]).wait()
    assert (dist.get_rank(), dist.get_world_size()) == ({2: 0, 0: 1}[rank], 2)
    model = nn.parallel.DistributedDataParallel(nn.Linear(3, 2))
    model(torch.full((2, 3), float(rank))).sum().backward()
    gradient = model.module.weight.grad
    assert gradient is not None and torch.equal(gradient, torch.full((2, 3), 2.0))
    dist._reconfigure(4, set(handles) - {handles[1]}).wait()
    gathered: list[object] = [None, None]
    dist.all_gather_object(gathered, rank)
    assert sorted(map(int, map(str, gathered))) == [0, 2]


@needs_reconfigure
def test_a_group_goes_on_without_a_member_that_died() -> None:
    run(3, loses_one, may_die=(1,))


def fixed(rank: int, size: int) -> None:
    assert not dist._supports_reconfigure()
    with pytest.raises(ConfigError, match="enable_reconfigure=True"):
        dist._reconfigure(1, ["a", "b"])


@needs_reconfigure
def test_an_ordinary_group_keeps_its_members() -> None:
    run(2, fixed)


def nobody_comes(rank: int, size: int) -> None:
    _, handles = waiting(rank, size)
    if rank == 1:
        dist.distributed_c10d._get_default_store().wait(["over"], timedelta(seconds=30))
        return
    with pytest.raises(CommError, match="1"):
        dist._reconfigure(1, handles, timeout=timedelta(seconds=1))
    dist.distributed_c10d._get_default_store().set("over", "")


@needs_reconfigure
def test_members_that_do_not_come_are_named() -> None:
    run(2, nobody_comes)
