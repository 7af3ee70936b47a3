"""What groups are besides their functions: members, names, numbers, other devices; on every rank."""

from __future__ import annotations

import datetime

import pytest
import torch
import torch.distributed as dist


def total(size: int) -> int:
    return size * (size + 1) // 2


def check_groups_overlap(rank: int, size: int) -> None:
    everyone = list(range(size))
    groups = [(members, dist.new_group(members)) for members in (everyone[:-1], everyone[1:], everyone)]
    for _ in range(3):
        for members, group in groups:
            if rank in members:
                t = torch.tensor([float(rank)])
                dist.all_reduce(t, group=group)
                assert t.item() == sum(members)
                assert dist.get_group_rank(group, rank) == members.index(rank)
    for members, group in groups:
        if rank in members:
            dist.destroy_process_group(group)


def check_device_mesh(rank: int, size: int) -> None:
    if size % 2:
        return
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("a", "b"))
    t = torch.tensor([float(rank)])
    dist.all_reduce(t, group=mesh.get_group("b"))
    assert t.item() == 2 * (rank // 2 * 2) + 1
    t = torch.tensor([float(rank)])
    dist.all_reduce(t, group=mesh.get_group("a"))
    assert t.item() == sum(r for r in range(size) if r % 2 == rank % 2)


def check_names_and_sequence_numbers(rank: int, size: int) -> None:
    group = dist.group.WORLD
    assert dist.get_backend() == "paceline" and group.name() == "paceline"
    assert group._device_types == [torch.device("cpu")]
    before = group._get_sequence_number_for_group()
    dist.all_reduce(torch.ones(3))
    assert group._get_sequence_number_for_group() == before + 1
    assert group.group_name and isinstance(group.group_desc, str)
    everyone = [None] * size
    dist.all_gather_object(everyone, group._get_sequence_number_for_group())
    assert len(set(everyone)) == 1


def check_monitored_barrier(rank: int, size: int) -> None:
    dist.monitored_barrier()
    if rank != 1:
        message = "Rank 1 failed to pass" if rank == 0 else "check rank 0 logs"
        with pytest.raises(RuntimeError, match=message):
            dist.monitored_barrier(timeout=datetime.timedelta(seconds=0.3))
    dist.barrier()
    dist.group.WORLD._monitored = 2  # rank 1 left one out
    dist.monitored_barrier(wait_all_ranks=True)


def check_profiler_records(rank: int, size: int) -> None:
    with torch.profiler.profile(record_shapes=True) as profile:
        dist.all_reduce(torch.ones(3, 4))
        dist.broadcast(torch.ones(2), src=0)
    names = {e.name: e.input_shapes for e in profile.events()}
    assert [3, 4] in names["paceline:all_reduce"]
    assert "paceline:broadcast" in names


def check_wrong_arguments_are_refused(rank: int, size: int) -> None:
    one = torch.ones(4)
    with pytest.raises(ValueError, match="elements expected"):
        dist.all_gather_single(torch.empty(3), one)
    with pytest.raises((ValueError, TypeError)):
        dist.all_gather([torch.empty(4, dtype=torch.int64)] * size, one)
    with pytest.raises(ValueError, match="tensors expected"):
        dist.all_gather([torch.empty(4)] * (size + 1), one)
    with pytest.raises(ValueError, match="Split sizes"):
        dist.all_to_all_single(torch.empty(4), one, [1] * size, [9] * size)
    with pytest.raises(ValueError, match="non-integral"):
        dist.all_reduce(one, op=dist.ReduceOp.BAND)
    with pytest.raises(ValueError, match="cannot be reduced"):
        dist.all_reduce(torch.ones(2).to(torch.float8_e4m3fn))


def check_functional_collectives(rank: int, size: int) -> None:
    import torch.distributed._functional_collectives as functional

    group = dist.group.WORLD
    t = torch.full((4,), float(rank + 1))
    assert functional.all_reduce(t, "sum", group).tolist() == [total(size)] * 4
    assert functional.all_gather_tensor(t, 0, group).shape == (4 * size,)
    share = functional.reduce_scatter_tensor(torch.ones(4 * size), "avg", 0, group)
    assert share.tolist() == [1.0] * 4
    assert functional.broadcast(t, 1, group).tolist() == [2.0] * 4
    assert functional.all_to_all_single(torch.ones(size), None, None, group).tolist() == [1.0] * size
    both = functional.all_reduce_coalesced([t.clone(), t.clone()], "max", group)
    assert [b[0].item() for b in both] == [size] * 2


def check_tensors_of_other_devices_go_to_their_backend(rank: int, size: int) -> None:
    class Other:
        calls: tuple = ()

        def allreduce(self, tensors: list, opts: object) -> dist.Work:
            self.calls = (*self.calls, tensors[0].device.type)
            return dist.barrier(async_op=True)

    group = dist.group.WORLD
    with pytest.raises(ValueError, match="CPU tensor expected"):
        dist.all_reduce(torch.empty(3, device="meta"))
    group.other_backends["meta"] = other = Other()
    dist.all_reduce(torch.empty(3, device="meta"))
    assert other.calls == ("meta",)
    assert torch.device("meta") in group._device_types and group._get_backend(torch.device("meta")) is other
    del group.other_backends["meta"]


def check_many_groups(rank: int, size: int) -> None:
    for _ in range(20):
        group = dist.new_group(list(range(size)))
        t = torch.ones(1)
        dist.all_reduce(t, group=group)
        assert t.item() == size
        dist.destroy_process_group(group)


def check_lists_of_tensors_that_lie_anywhere(rank: int, size: int) -> None:
    for numel in (1, 3000, 200_000):
        for is_async in (False, True):
            outs = [torch.empty(numel) for _ in range(size)][::-1]
            work = dist.all_gather(outs, torch.full((numel,), float(rank)), async_op=is_async)
            boxes = [torch.empty(numel + 10 * rank) for _ in range(size)]
            sent = [torch.full((numel + 10 * r,), 10.0 * rank + r) for r in range(size)]
            other = dist.all_to_all(boxes, sent, async_op=is_async)
            if is_async:
                work.wait()
                other.wait()
            for r in range(size):
                assert bool((outs[r] == r).all())
                assert bool((boxes[r] == 10 * r + rank).all())


def check_errors_are_those_that_callers_of_other_backends_expect(rank: int, size: int) -> None:
    with pytest.raises(RuntimeError, match="BAND"):
        dist.all_reduce(torch.ones(2), op=dist.ReduceOp.BAND)
    square = torch.ones(size, size)
    with pytest.raises(ValueError, match="must be contiguous"):
        dist.all_to_all_single(torch.empty(size, size), square.t())
    work = dist.all_reduce(torch.ones(2), async_op=True)
    work.wait()
    with pytest.raises(RuntimeError, match="source"):
        work.source_rank()
    if rank == 0:
        dist.send(torch.ones(1), 1)
    if rank == 1:
        receive = dist.irecv(torch.empty(1), 0)
        receive.wait()
        assert receive.source_rank() == 0


def check_a_tensor_twice_in_a_coalesced_call(rank: int, size: int) -> None:
    t = torch.full((3,), float(rank + 1))
    dist.group.WORLD.allreduce_coalesced([t, t]).wait()
    assert t.tolist() == [size * (size + 1) / 2] * 3


def check_futures_of_operations_that_pack_their_outputs(rank: int, size: int) -> None:
    for _ in range(200):
        outs = [torch.empty(6, 2)[:, 1] for _ in range(size)]
        future = dist.all_gather(outs, torch.full((6,), float(rank)), async_op=True).get_future()
        future.wait()
        assert [o[3].item() for o in outs] == list(range(size))
