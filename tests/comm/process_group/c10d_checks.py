"""What every function of torch.distributed must do on every rank, whatever the backend."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
REAL = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def total(size: int) -> int:
    return size * (size + 1) // 2


def check_all_reduce_of_every_dtype(rank: int, size: int) -> None:
    for dtype in WHOLE + REAL:
        for numel in (0, 1, 7, 1000, 100_003):
            t = torch.full((numel,), rank + 1, dtype=dtype)
            dist.all_reduce(t)
            assert bool((t == total(size)).all()), (dtype, numel)


def check_all_reduce_of_every_operator(rank: int, size: int) -> None:
    ranks = torch.arange(1, size + 1)
    for op, expected in (
        (dist.ReduceOp.PRODUCT, ranks.prod()),
        (dist.ReduceOp.MIN, ranks.min()),
        (dist.ReduceOp.MAX, ranks.max()),
    ):
        for dtype in (torch.int32, torch.float32, torch.float64):
            t = torch.full((5,), rank + 1, dtype=dtype)
            dist.all_reduce(t, op=op)
            assert bool((t == expected.to(dtype)).all()), (op, dtype)
    bits = torch.tensor([1 << rank, 3, rank])
    for op, fold in (
        (dist.ReduceOp.BOR, torch.bitwise_or),
        (dist.ReduceOp.BAND, torch.bitwise_and),
        (dist.ReduceOp.BXOR, torch.bitwise_xor),
    ):
        expected = torch.tensor([1, 3, 0])
        for r in range(1, size):
            expected = fold(expected, torch.tensor([1 << r, 3, r]))
        t = bits.clone()
        dist.all_reduce(t, op=op)
        assert torch.equal(t, expected), op


def check_average_also_of_whole_numbers(rank: int, size: int) -> None:
    t = torch.full((5,), float(rank))
    dist.all_reduce(t, op=dist.ReduceOp.AVG)
    torch.testing.assert_close(t, torch.full((5,), (size - 1) / 2))
    t = torch.full((5,), rank * size, dtype=torch.int64)
    dist.all_reduce(t, op=dist.ReduceOp.AVG)
    assert t.tolist() == [(size - 1) * size // 2] * 5


def check_premultiplied_sum(rank: int, size: int) -> None:
    op = dist._make_nccl_premul_sum(2.0)
    t = torch.full((5,), rank + 1.0)
    dist.all_reduce(t, op=op)
    assert t.tolist() == [2.0 * total(size)] * 5
    source, out = torch.full((3 * size,), rank + 1.0), torch.empty(3)
    dist.reduce_scatter_single(out, source, op=op)
    assert out.tolist() == [2.0 * total(size)] * 3
    assert source[0] == rank + 1, "the input of another tensor's reduction must not change"


def check_complex(rank: int, size: int) -> None:
    t = torch.full((4,), complex(rank + 1, -rank))
    dist.all_reduce(t)
    assert t.tolist() == [complex(total(size), -total(size - 1))] * 4
    outs = [torch.empty(2, dtype=torch.complex64) for _ in range(size)]
    dist.all_gather(outs, torch.full((2,), complex(rank, 1)))
    assert [o[1].item() for o in outs] == [complex(r, 1) for r in range(size)]
    with pytest.raises(ValueError, match="complex"):
        dist.all_reduce(t, op=dist.ReduceOp.MAX)


def check_sparse(rank: int, size: int) -> None:
    indices = torch.tensor([[rank, size], [0, 1]])
    t = torch.sparse_coo_tensor(indices, torch.tensor([1.0 + rank, 2.0]), (size + 1, 2))
    dist.all_reduce(t)
    dense = t.to_dense()
    assert dense[size, 1] == 2 * size
    assert dense[:size, 0].tolist() == [1.0 + r for r in range(size)]
    with pytest.raises(ValueError, match="unsupported layout"):
        dist.all_reduce(t, op=dist.ReduceOp.MAX)


def check_tensors_that_are_not_contiguous(rank: int, size: int) -> None:
    base = torch.arange(24.0).view(4, 6)
    for view in (base.t(), base[:, ::2], base.t()[1:4]):
        t = torch.empty_strided(view.shape, view.stride()).copy_(view)
        expected = t * size
        dist.all_reduce(t)
        assert torch.equal(t, expected)
    gap = torch.full((6, 2), float(rank))
    dist.broadcast(gap[:, 0], src=1)
    assert gap[:, 0].tolist() == [1.0] * 6
    assert gap[:, 1].tolist() == [float(rank)] * 6
    outs = [torch.empty(6, 2)[:, 1] for _ in range(size)]
    dist.all_gather(outs, torch.full((6, 2), float(rank))[:, 0])
    assert [o[3].item() for o in outs] == list(range(size))


def check_reduce_and_broadcast_from_every_root(rank: int, size: int) -> None:
    for root in range(size):
        t = torch.full((1000,), float(rank + 1))
        dist.reduce(t, dst=root)
        assert rank != root or t[999] == total(size)
        t = torch.full((70_000,), float(rank))
        dist.broadcast(t, src=root)
        assert t[69_999] == root


def check_gather_and_scatter(rank: int, size: int) -> None:
    for root in range(size):
        outs = [torch.empty(3) for _ in range(size)] if rank == root else None
        dist.gather(torch.full((3,), float(rank)), outs, dst=root)
        assert outs is None or [o[2].item() for o in outs] == list(range(size))
        sources = [torch.full((3,), 10.0 * root + r) for r in range(size)] if rank == root else None
        out = torch.empty(3)
        dist.scatter(out, sources, src=root)
        assert out.tolist() == [10.0 * root + rank] * 3


def check_all_gather_in_every_form(rank: int, size: int) -> None:
    for numel in (1, 5000, 300_000):
        outs = [torch.empty(numel) for _ in range(size)]
        dist.all_gather(outs, torch.full((numel,), float(rank)))
        assert [o[-1].item() for o in outs] == list(range(size))
        whole = torch.empty(numel * size)
        dist.all_gather_single(whole, torch.full((numel,), float(rank)))
        assert whole.view(size, numel)[:, -1].tolist() == list(range(size))
    outs = [torch.empty(r + 1) for r in range(size)]
    dist.all_gather(outs, torch.full((rank + 1,), float(rank)))
    assert [o[-1].item() for o in outs] == list(range(size))
    for dtype in (torch.float8_e4m3fn, torch.bool, torch.complex64, torch.complex32):
        whole = torch.empty(2 * size, dtype=dtype)
        dist.all_gather_single(whole, torch.ones(2).to(dtype))
        assert bool((whole.to(torch.complex64) == 1).all())


def check_reduce_scatter_in_every_form(rank: int, size: int) -> None:
    for numel in (1, 5000, 300_000):
        out = torch.empty(numel)
        dist.reduce_scatter(out, [torch.full((numel,), float(rank + r)) for r in range(size)])
        assert out[-1] == sum(q + rank for q in range(size))
        source = torch.cat([torch.full((numel,), float(rank + r)) for r in range(size)])
        dist.reduce_scatter_single(out, source, op=dist.ReduceOp.AVG)
        torch.testing.assert_close(out[-1].item(), sum(q + rank for q in range(size)) / size)
    out = torch.empty(rank + 1)
    dist.reduce_scatter(out, [torch.full((r + 1,), float(r)) for r in range(size)])
    assert out[-1] == rank * size


def check_all_to_all_in_every_form(rank: int, size: int) -> None:
    source = torch.cat([torch.full((3,), 10.0 * rank + r) for r in range(size)])
    out = torch.empty(3 * size)
    dist.all_to_all_single(out, source)
    assert out.view(size, 3)[:, 0].tolist() == [10.0 * r + rank for r in range(size)]
    sent, received = list(range(size)), [rank] * size
    source = torch.cat([torch.full((r, 2), 10.0 * rank + r) for r in range(size)])
    out = torch.empty(rank * size, 2)
    dist.all_to_all_single(out, source, received, sent)
    assert out[:, 1].tolist() == [10.0 * r + rank for r in range(size) for _ in range(rank)]
    outs = [torch.empty(2) for _ in range(size)]
    dist.all_to_all(outs, [torch.full((2,), 10.0 * rank + r) for r in range(size)])
    assert [o[1].item() for o in outs] == [10.0 * r + rank for r in range(size)]


def check_objects(rank: int, size: int) -> None:
    everyone: list[object] = [None] * size
    dist.all_gather_object(everyone, {"rank": rank, "text": "x" * rank})
    assert everyone == [{"rank": r, "text": "x" * r} for r in range(size)]
    shared = [("root", rank)]
    dist.broadcast_object_list(shared, src=1)
    assert shared == [("root", 1)]
    mine = [None]
    dist.scatter_object_list(mine, list(range(size)) if rank == 0 else None, src=0)
    assert mine == [rank]
    gathered = [None] * size if rank == 1 else None
    dist.gather_object(rank, gathered, dst=1)
    assert gathered is None or gathered == list(range(size))
    if rank == 0:
        dist.send_object_list([1, "two"], dst=1)
    elif rank == 1:
        got = [None, None]
        dist.recv_object_list(got, src=0)
        assert got == [1, "two"]


def check_point_to_point(rank: int, size: int) -> None:
    after, before = (rank + 1) % size, (rank - 1) % size
    inbox = torch.empty(200_000)
    work = dist.isend(torch.full((200_000,), float(rank)), after)
    assert dist.recv(inbox, before) == before
    work.wait()
    assert inbox[-1] == before
    # Tags choose; order within a tag stays.
    works = [dist.isend(torch.full((3,), float(v)), after, tag=t) for v, t in ((1, 5), (2, 6), (3, 5))]
    got = [torch.empty(3) for _ in range(3)]
    for box, tag in zip(got, (6, 5, 5), strict=True):
        dist.recv(box, before, tag=tag)
    assert [g[0].item() for g in got] == [2, 1, 3]
    for w in works:
        w.wait()
    me = torch.empty(3)
    works = [dist.isend(torch.full((3,), 7.0), rank, tag=9), dist.irecv(me, rank, tag=9)]
    for w in works:
        w.wait()
    assert me[0] == 7


def check_receive_from_anybody(rank: int, size: int) -> None:
    if rank:
        dist.send(torch.full((2,), float(rank)), 0, tag=3)
        return
    seen = set()
    for _ in range(size - 1):
        box = torch.empty(2)
        source = dist.recv(box, tag=3)
        assert box[0] == source
        seen.add(source)
    assert seen == set(range(1, size))


def check_batched_point_to_point(rank: int, size: int) -> None:
    inbox = [torch.empty(50) for _ in range(size)]
    ops = [dist.P2POp(dist.isend, torch.full((50,), float(rank)), r) for r in range(size) if r != rank]
    ops += [dist.P2POp(dist.irecv, inbox[r], r) for r in range(size) if r != rank]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    assert all(inbox[r][49] == r for r in range(size) if r != rank)


def check_coalesced(rank: int, size: int) -> None:
    tensors = [torch.full((n,), float(rank + 1)) for n in (1, 10, 1000)]
    with dist.distributed_c10d._coalescing_manager():
        for t in tensors:
            dist.all_reduce(t)
    assert all(t[-1] == total(size) for t in tensors)
    outs = [torch.empty(n * size) for n in (2, 30)]
    with dist.distributed_c10d._coalescing_manager(async_ops=True) as manager:
        for o, n in zip(outs, (2, 30), strict=True):
            dist.all_gather_single(o, torch.full((n,), float(rank)))
    manager.wait()
    assert all(o[-1] == size - 1 for o in outs)
    shares = [torch.empty(n) for n in (2, 30)]
    with dist.distributed_c10d._coalescing_manager():
        for s in shares:
            dist.reduce_scatter_single(s, torch.ones(s.numel() * size))
    assert all(s[-1] == size for s in shares)
    with dist.distributed_c10d._coalescing_manager(device=torch.device("cpu"), async_ops=True) as manager:
        for t in tensors:
            dist.broadcast(t, src=0)
    manager.wait()


def check_asynchronous_works(rank: int, size: int) -> None:
    tensors = [torch.full((n,), float(rank + 1)) for n in (1, 1000, 300_000)] * 1
    works = [dist.all_reduce(t, async_op=True) for t in tensors]
    futures = [w.get_future() for w in works]
    for t, f, w in zip(tensors, futures, works, strict=True):
        value = f.wait()
        assert isinstance(value, list) and value[0].data_ptr() == t.data_ptr()
        assert w.wait() and w.is_completed() and w.is_success() and w.exception() is None
        assert w.result()[0].data_ptr() == t.data_ptr()
        assert t[-1] == total(size)
    work = dist.barrier(async_op=True)
    work.wait()
    assert work.get_future().wait() == []


def check_gathers_complete_without_wait_when_a_future_says_so(rank: int, size: int) -> None:
    outs = [torch.empty(100_000) for _ in range(size)]
    future = dist.all_gather(outs, torch.full((100_000,), float(rank)), async_op=True).get_future()
    doubled = future.then(lambda f: [2 * t for t in f.value()])
    assert [t[-1].item() for t in doubled.wait()] == [2.0 * r for r in range(size)]


def check_tensors_live_while_in_flight(rank: int, size: int) -> None:
    kept = torch.full((400_000,), float(rank))
    for _ in range(5):
        dist.all_reduce(torch.ones(400_000), async_op=True)  # nobody keeps the tensor or the work
    dist.all_reduce(kept)
    assert kept[-1] == total(size - 1)
