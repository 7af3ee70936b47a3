"""Every collective on 3 ranks, checked on each; names Horovod only."""

import horovod.torch as hvd
import torch

hvd.init()
rank, size = hvd.rank(), hvd.size()
assert hvd.local_rank() == rank
assert (hvd.local_size(), hvd.cross_rank(), hvd.cross_size(), hvd.is_homogeneous()) == (size, 0, 1, True)

# Reductions, types, factors, in-place, groups.
base = torch.arange(5.0)
total = sum(base + r for r in range(size))
assert torch.equal(hvd.allreduce(base + rank, op=hvd.Sum), total)
assert torch.equal(hvd.allreduce(base + rank, average=False), total)
assert torch.allclose(hvd.allreduce(base + rank), total / size)
assert torch.equal(
    hvd.allreduce(base + rank, op=hvd.Sum, prescale_factor=0.5, postscale_factor=4.0), total * 2
)
assert torch.equal(hvd.allreduce(torch.tensor([rank]), op=hvd.Max), torch.tensor([size - 1]))
assert torch.equal(hvd.allreduce(torch.tensor([rank + 1]), op=hvd.Product), torch.tensor([6]))
assert torch.equal(hvd.allreduce(torch.tensor([rank]), op=hvd.Min), torch.tensor([0]))
assert hvd.allreduce(torch.ones(2, dtype=torch.int32)).dtype == torch.int32
mine = (base + rank).clone()
assert hvd.allreduce_(mine, op=hvd.Sum) is mine
assert torch.equal(mine, total)
strided = (torch.arange(6.0).view(2, 3) + rank).t()
assert torch.equal(
    hvd.allreduce_(strided, op=hvd.Sum), sum(torch.arange(6.0).view(2, 3).t() + r for r in range(size))
)
group = hvd.grouped_allreduce([base + rank, torch.ones(2, 2)], op=hvd.Sum)
assert torch.equal(group[0], total)
assert torch.equal(group[1], torch.full((2, 2), float(size)))
assert torch.equal(hvd.allreduce(base + rank, op=hvd.Sum, compression=hvd.Compression.fp16), total)

# Ranks submit the same names in different orders.
order = sorted("abcdef", key=lambda k: hash((k, rank)) if rank else k)
handles = {k: hvd.allreduce_async(torch.full((3,), float(ord(k))), name=k, op=hvd.Sum) for k in order}
for k in sorted(order, reverse=bool(rank % 2)):
    assert hvd.synchronize(handles[k])[0] == size * ord(k)
handle = hvd.allreduce_async(torch.ones(1), name="polled")
while not hvd.poll(handle):
    pass
hvd.synchronize(handle)

# Gather, broadcast, exchange, scatter; rows differ between ranks.
rows = hvd.allgather(torch.full((rank + 1, 2), float(rank)))
assert rows[:, 0].tolist() == [float(r) for r in range(size) for _ in range(r + 1)]
assert hvd.broadcast(torch.tensor([rank]), root_rank=size - 1).item() == size - 1
in_place = torch.tensor([float(rank)])
assert hvd.broadcast_(in_place, root_rank=1) is in_place
assert in_place.item() == 1
got, splits = hvd.alltoall(torch.arange(float(size * (size + 1) // 2)), splits=[i + 1 for i in range(size)])
assert splits.tolist() == [rank + 1] * size
assert got.tolist() == list(range(rank * (rank + 1) // 2, (rank + 1) * (rank + 2) // 2)) * size
assert hvd.alltoall(torch.full((size,), float(rank))).tolist() == [float(r) for r in range(size)]
part = hvd.reducescatter(torch.arange(float(2 * size + 1)), op=hvd.Sum)
assert part.tolist() == [float(size * i) for i in range(2 * size + 1)][slice(*[(0, 3), (3, 5), (5, 7)][rank])]
assert hvd.allgather_object({"rank": rank}) == [{"rank": r} for r in range(size)]
assert hvd.broadcast_object([rank], root_rank=1) == [1]
sparse = torch.sparse_coo_tensor([[0, rank]], [1.0, 2.0], (4,))
dense = hvd.sparse_allreduce_async(sparse, name="sparse", op=hvd.Sum)().to_dense()
assert torch.equal(
    dense, sum(torch.sparse_coo_tensor([[0, r]], [1.0, 2.0], (4,)).to_dense() for r in range(size))
)

# An average is a division: exact where the sum is a multiple of the number of ranks.
whole = torch.arange(-300, 300)
for kind in (torch.int32, torch.int64, torch.float32, torch.float16):
    assert torch.equal(hvd.allreduce(whole.to(kind)), whole.to(kind))
    assert torch.equal(hvd.reducescatter(whole.to(kind)), whole.to(kind).tensor_split(size)[rank])

# Gradients flow.
x = torch.ones(3, requires_grad=True)
hvd.allreduce(x, op=hvd.Sum).sum().backward()
assert x.grad.tolist() == [size] * 3
y = torch.ones(rank + 1, requires_grad=True)
hvd.allgather(y).pow(2).sum().backward()
assert y.grad.tolist() == [2.0] * (rank + 1)
z = torch.ones(2, requires_grad=True)
(hvd.broadcast(z, root_rank=1) * (rank + 1)).sum().backward()
assert z.grad.tolist() == ([2.0, 2.0] if rank == 1 else [0.0, 0.0])

# Process sets.
pair = hvd.add_process_set([0, 2])
if pair.included():
    assert pair.rank() == rank // 2
    assert hvd.allreduce(torch.tensor([float(rank)]), op=hvd.Sum, process_set=pair).item() == 2
    two = torch.tensor([1.0, 0.0] if rank == 0 else [0.0, 1.0])
    assert torch.allclose(hvd.allreduce(two, op=hvd.Adasum, process_set=pair), torch.ones(2))
    assert torch.allclose(hvd.allreduce(torch.ones(2), op=hvd.Adasum, process_set=pair), torch.ones(2))
    assert hvd.broadcast(torch.tensor([rank]), root_rank=2, process_set=pair).item() == 2
assert hvd.remove_process_set(pair)
assert not hvd.remove_process_set(hvd.global_process_set)

# Errors reach every rank and do not end the job.
try:
    hvd.allreduce(torch.ones(2 + rank), name="shapes differ")
    raise SystemExit("a mismatch was not noticed")
except hvd.HorovodInternalError as error:
    assert "rank 0" in str(error)
first = hvd.allreduce_async(torch.ones(1), name="twice") if rank else None
if rank:
    try:
        hvd.allreduce_async(torch.ones(1), name="twice")
        raise SystemExit("a duplicate name was not noticed")
    except ValueError as error:
        assert "twice" in str(error)
first = first if first is not None else hvd.allreduce_async(torch.ones(1), name="twice")
hvd.synchronize(first)

# Batch statistics over ranks: as one big batch.
torch.manual_seed(0)
batch = torch.randn(size * 4, 3, 2)
share = batch[rank * 4 : rank * 4 + 4].clone().requires_grad_()
whole = batch.clone().requires_grad_()
ours, theirs = hvd.SyncBatchNorm(3), torch.nn.BatchNorm1d(3)
out, reference = ours(share), theirs(whole)
assert torch.allclose(out, reference[rank * 4 : rank * 4 + 4], atol=1e-5)
assert torch.allclose(ours.running_var, theirs.running_var, atol=1e-5)
out.pow(3).sum().backward()
reference.pow(3).sum().backward()
assert torch.allclose(share.grad, whole.grad[rank * 4 : rank * 4 + 4], atol=1e-3)
with torch.no_grad():
    whole, norms = batch + 1e4, (hvd.SyncBatchNorm(3, momentum=1.0), torch.nn.BatchNorm1d(3, momentum=1.0))
    norms[0](whole[rank * 4 : rank * 4 + 4]), norms[1](whole)
assert torch.allclose(norms[0].running_var, norms[1].running_var, rtol=1e-2)

# Ranks run out of data one after another.
for i in range(rank + 1):
    expected = float(size - i)
    assert hvd.allreduce(torch.ones(2), name=f"step{i}", op=hvd.Sum).tolist() == [expected] * 2
assert hvd.join() == size - 1
hvd.barrier()
hvd.shutdown()
hvd.init()
assert hvd.allreduce(torch.ones(1), op=hvd.Sum).item() == size
print("all good")
