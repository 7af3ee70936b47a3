"""Gradients have Horovod's factors: every rank's loss counts 1/P, and P times under reducescatter's Sum."""

import horovod.torch as hvd
import torch

hvd.init()
rank, size = hvd.rank(), hvd.size()
mean_weight = sum(r + 1 for r in range(size)) / size


def gradient(operation, *shapes):
    """The gradients of (rank + 1) times the sum of all results."""
    inputs = [torch.ones(shape, requires_grad=True) for shape in shapes]
    results = operation(inputs)
    assert all(r.grad_fn is not None for r in results)
    ((rank + 1) * sum(r.sum() for r in results)).backward()
    return [i.grad for i in inputs]


def expect(found, *values):
    for tensor, value in zip(found, values, strict=True):
        assert torch.allclose(tensor, torch.as_tensor(value).expand_as(tensor)), (rank, tensor, value)


expect(gradient(lambda x: [hvd.allreduce(x[0])], (3,)), mean_weight)
expect(gradient(lambda x: [hvd.allreduce(x[0], op=hvd.Sum)], (3,)), mean_weight * size)
expect(gradient(lambda x: [hvd.allgather(x[0])], (rank + 1, 2)), mean_weight)
expect(gradient(lambda x: [hvd.broadcast(x[0], 1)], (3,)), mean_weight if rank == 1 else 0.0)
grouped = ((3,), (2, 2))
expect(gradient(hvd.grouped_allreduce, *grouped), mean_weight, mean_weight)
expect(gradient(lambda x: hvd.grouped_allreduce(x, op=hvd.Sum), *grouped), *[mean_weight * size] * 2)
expect(gradient(hvd.grouped_allgather, (rank + 1,), (2, 2)), mean_weight, mean_weight)
rows = torch.arange(1.0, size + 1).repeat_interleave(2)
expect(gradient(lambda x: [hvd.reducescatter(x[0])], (2 * size,)), rows)
expect(gradient(lambda x: [hvd.reducescatter(x[0], op=hvd.Sum)], (2 * size,)), rows * size)
scaled = {"op": hvd.Sum, "prescale_factor": 0.5, "postscale_factor": 3.0}
expect(gradient(lambda x: [hvd.reducescatter(x[0], **scaled)], (2 * size,)), rows * size * 1.5)
both = gradient(lambda x: hvd.grouped_reducescatter(x, **scaled), (2 * size,), (2 * size, 1))
expect(both, rows * size * 1.5, rows[:, None] * size * 1.5)
expect(gradient(lambda x: [hvd.alltoall(x[0])], (size,)), torch.arange(1.0, size + 1))
print("all good")
