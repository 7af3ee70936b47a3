"""Every operation of the native fabric against NumPy, on private and on allocated memory."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from shm_ranks import run

from paceline.errors import ConfigError
from paceline.types import ReduceOp

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("processes")]

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int16,
    torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64, torch.bool, torch.complex64,
    torch.complex128,
]  # fmt: skip
# Eager, one staged slice, several slices with a remainder.
SIZES = [0, 1, 3, 1021, 30011, 700_001]


def values(rank, n, dtype):
    g = torch.Generator().manual_seed(1000 * rank + n)
    if dtype == torch.bool:
        return torch.randint(0, 2, (n,), generator=g, dtype=torch.bool)
    if dtype.is_complex:
        parts = torch.float32 if dtype == torch.complex64 else torch.float64
        return torch.view_as_complex(torch.randint(-3, 4, (n, 2), generator=g).to(parts))
    return torch.randint(0 if "uint" in str(dtype) else -3, 4, (n,), generator=g).to(dtype)


def expected(inputs, op):
    """Reduction in rank order, by NumPy; float16 and bfloat16 accumulate in float32."""
    dtype = inputs[0].dtype
    half = dtype in (torch.float16, torch.bfloat16)
    arrays = [(t.float() if half else t).numpy() for t in inputs]
    functions = {
        ReduceOp.SUM: np.add, ReduceOp.MEAN: np.add, ReduceOp.PRODUCT: np.multiply, ReduceOp.MIN: np.minimum,
        ReduceOp.MAX: np.maximum, ReduceOp.BAND: np.bitwise_and, ReduceOp.BOR: np.bitwise_or,
        ReduceOp.BXOR: np.bitwise_xor,
    }  # fmt: skip
    total = arrays[0]
    for a in arrays[1:]:
        total = functions[op](total, a)
    if op is ReduceOp.MEAN:
        n = len(inputs)
        if dtype.is_complex:
            total = torch.view_as_complex(torch.view_as_real(torch.from_numpy(total)) / n).numpy()
        elif dtype.is_floating_point:
            total = total / np.array(n, total.dtype)
        else:
            total = np.sign(total.astype(np.int64)) * (np.abs(total.astype(np.int64)) // n)
    return torch.from_numpy(np.ascontiguousarray(total)).to(dtype)


def supported(dtype, op):
    if op in (ReduceOp.BAND, ReduceOp.BOR, ReduceOp.BXOR):
        return not (dtype.is_floating_point or dtype.is_complex)
    if op in (ReduceOp.MIN, ReduceOp.MAX):
        return not dtype.is_complex
    return op is not ReduceOp.MEAN or dtype != torch.bool


def place(comm, tensor, allocated):
    if not allocated:
        return tensor.clone()
    out = comm.allocate(tensor.numel(), tensor.dtype)
    out.copy_(tensor)
    return out


def empty(comm, n, dtype, allocated):
    return comm.allocate(n, dtype) if allocated else torch.empty(n, dtype=dtype)


def check(got, want, *context):
    assert torch.equal(got, want), (*context, got[:8], want[:8], int((got != want).sum()))


def all_reduce_body(comm, allocated):
    for dtype in DTYPES:
        for op in ReduceOp:
            if not supported(dtype, op):
                continue
            for n in SIZES if dtype == torch.float32 else [3, 1021, 30011]:
                if n > 2000 and op not in (ReduceOp.SUM, ReduceOp.MEAN):
                    continue
                inputs = [values(r, n, dtype) for r in range(comm.size)]
                mine = place(comm, inputs[comm.rank], allocated)
                comm.all_reduce(mine, op=op).wait()
                check(mine, expected(inputs, op), dtype, op, n)


def rooted_body(comm, allocated):
    me, size = comm.rank, comm.size
    for dtype in (torch.float32, torch.int16):
        for n in (0, 1, 1021, 30011, 200_003):
            inputs = [values(r, n, dtype) for r in range(size)]
            for root in {0, size - 1}:
                mine = place(comm, inputs[me], allocated)
                comm.reduce(mine, root=root).wait()
                if me == root:
                    check(mine, expected(inputs, ReduceOp.SUM), "reduce", n)
                mine = place(comm, inputs[me], allocated)
                comm.broadcast(mine, root=root).wait()
                check(mine, inputs[root], "broadcast", n)
                out = empty(comm, n * size, dtype, allocated) if me == root else None
                comm.gather(out, place(comm, inputs[me], allocated), root=root).wait()
                if me == root:
                    check(out, torch.cat(inputs), "gather", n)
                out = empty(comm, n, dtype, allocated)
                whole = torch.cat(inputs)
                comm.scatter(out, place(comm, whole, allocated) if me == root else None, root=root).wait()
                check(out, inputs[me], "scatter", n)


def exchange_body(comm, allocated):
    me, size = comm.rank, comm.size
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        for n in (0, 1, 1021, 30011, 200_003):
            blocks = [[values(17 * s + d, n, dtype) for d in range(size)] for s in range(size)]
            wholes = [torch.cat(b) for b in blocks]
            out = empty(comm, n * size, dtype, allocated)
            comm.all_gather(out, place(comm, blocks[me][0], allocated)).wait()
            check(out, torch.cat([b[0] for b in blocks]), "all_gather", n)
            comm.all_to_all(out, place(comm, wholes[me], allocated)).wait()
            check(out, torch.cat([b[me] for b in blocks]), "all_to_all", n)
            out = empty(comm, n, dtype, allocated)
            comm.reduce_scatter(out, place(comm, wholes[me], allocated), op=ReduceOp.MAX).wait()
            check(out, expected([b[me] for b in blocks], ReduceOp.MAX), "reduce_scatter", n)
    comm.barrier().wait()


def uneven_body(comm, allocated):
    me, size = comm.rank, comm.size
    for scale in (1, 991, 60_000):
        counts = [scale * ((3 * r) % 4) for r in range(size)]  # rank 0 has nothing
        parts = [values(r, c, torch.float32) for r, c in enumerate(counts)]
        out = empty(comm, sum(counts), torch.float32, allocated)
        comm.all_gather_v(out, place(comm, parts[me], allocated), counts=counts).wait()
        check(out, torch.cat(parts), "all_gather_v")
        wholes = [values(r, sum(counts), torch.float32) for r in range(size)]
        out = empty(comm, counts[me], torch.float32, allocated)
        comm.reduce_scatter_v(out, place(comm, wholes[me], allocated), counts=counts).wait()
        start = sum(counts[:me])
        want = expected(wholes, ReduceOp.SUM)[start : start + counts[me]]
        check(out, want, "reduce_scatter_v")
        sent = [[scale * ((s + 2 * d) % 3) for d in range(size)] for s in range(size)]
        data = [values(40 + s, sum(sent[s]), torch.float32) for s in range(size)]
        received = [sent[s][me] for s in range(size)]
        out = empty(comm, sum(received), torch.float32, allocated)
        comm.all_to_all_v(
            out, place(comm, data[me], allocated), output_counts=received, source_counts=sent[me]
        ).wait()
        check(out, torch.cat([d.split(sent[s])[me] for s, d in enumerate(data)]), "all_to_all_v")


def every_body(comm):
    for body in (all_reduce_body, rooted_body, exchange_body, uneven_body):
        for allocated in (False, True):
            body(comm, allocated)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_operations(size):
    run(size, every_body, limit_s=120)


def network_body(comm):
    for body in (all_reduce_body, rooted_body, exchange_body, uneven_body):
        body(comm, False)
    assert comm.wire_bytes > 0


@pytest.mark.parametrize("size", [3, *(pytest.param(p, marks=pytest.mark.slow) for p in (2, 4, 5))])
def test_operations_between_hosts(size):
    run(size, network_body, limit_s=120, network=True)


@pytest.mark.parametrize(
    "hosts", ["aab", *(pytest.param(h, marks=pytest.mark.slow) for h in ("abab", "baaab", "aabbcc", "abba"))]
)
def test_operations_on_hosts_with_several_ranks(hosts):
    run(len(hosts), network_body, limit_s=120, network=hosts)


def split_body(comm):
    """Groups within a host, across hosts, and of all ranks."""
    for ranks in ([0, 1], [0, 2], [1, 2], [0, 1, 2], [2]):
        part = comm.split(ranks)
        assert (part is not None) == (comm.rank in ranks)
        if part is None:
            continue
        for n in (3, 50_001):
            t = torch.full((n,), float(comm.rank + 1))
            part.all_reduce(t).wait()
            assert torch.all(t == sum(r + 1 for r in ranks))
        part.close()


def test_groups_of_hosts_with_several_ranks():
    run(3, split_body, network="aab")


def mixed_body(comm):
    """Some ranks have allocated buffers, others private ones."""
    for n in (1021, 100_003):
        inputs = [values(r, n, torch.float32) for r in range(comm.size)]
        for allocated_rank in range(comm.size):
            mine = place(comm, inputs[comm.rank], comm.rank == allocated_rank)
            comm.all_reduce(mine).wait()
            check(mine, expected(inputs, ReduceOp.SUM), n)
            out = empty(comm, n * comm.size, torch.float32, comm.rank != allocated_rank)
            comm.all_gather(out, place(comm, inputs[comm.rank], comm.rank == allocated_rank)).wait()
            check(out, torch.cat(inputs), n)


def test_mixed_memory():
    run(3, mixed_body)


class OwnTensor(torch.Tensor):
    """A class that the core does not read by itself."""


def kinds_body(comm):
    entry = comm.ledger.operations["all_reduce"]
    ones = torch.ones(3)
    kinds = {
        "parameter": torch.nn.Parameter(ones.clone()),
        "leaf": torch.ones(3, requires_grad=True),
        "own class": ones.clone().as_subclass(OwnTensor),
        "no dimension": torch.tensor(1.0),
        "conjugated": torch.full((3,), 1 + 1j).conj(),
        "part": torch.ones(10)[2:5],
        "odd strides": torch.ones(4, 8)[:, :1].as_strided((4, 1), (1, 5)),
    }
    for name, tensor in kinds.items():
        calls, num_bytes, before = entry.calls, entry.payload_bytes, tensor.detach().clone()
        comm.all_reduce(tensor).wait()
        assert torch.equal(tensor.detach(), before * comm.size), name
        assert (entry.calls, entry.payload_bytes) == (calls + 1, num_bytes + tensor.nbytes), name
    whole = torch.ones(10)
    comm.all_reduce(whole[2:5]).wait()
    assert whole.tolist() == [1, 1] + 3 * [comm.size] + 5 * [1]
    for refused in (torch.ones(4, 4).t()[:, :2], torch.ones(3).to(torch.float8_e4m3fn)):
        with pytest.raises(ConfigError):
            comm.all_reduce(refused)
    for operation in (comm.all_reduce, comm.reduce, functools.partial(comm.all_reduce, priority=1)):
        with pytest.raises(ConfigError, match=r"op must be a paceline.ReduceOp \(SUM, .*got 'mean'"):
            operation(ones, op="mean")


def test_all_reduce_of_every_kind_of_tensor():
    run(2, kinds_body)
