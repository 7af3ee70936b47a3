"""Optimizers: sparse gradients made dense on the way, fresh state, names, the environment of a worker."""

import os

import horovod.torch as hvd
import torch

hvd.init()
rank, size = hvd.rank(), hvd.size()
names = ("RANK", "SIZE", "LOCAL_RANK")
assert [os.environ[f"HOROVOD_{name}"] for name in names] == [str(rank), str(size), str(rank)]

for as_dense in (False, True):
    table = torch.nn.Embedding(10, 3, sparse=True)
    with torch.no_grad():
        table.weight.zero_()
    optimizer = torch.optim.SparseAdam(list(table.parameters()), lr=0.1)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0, model=table)
    assert table.weight.grad.is_sparse
    optimizer = hvd.DistributedOptimizer(optimizer, sparse_as_dense=as_dense)
    optimizer.zero_grad()
    table(torch.tensor([rank, 7])).sum().backward()
    optimizer.step()
    moved = table.weight.detach().abs().sum(1).nonzero().flatten().tolist()
    assert moved == [*range(size), 7], moved
    assert all(torch.equal(w, table.weight) for w in hvd.allgather(table.weight.detach()[None]))

layer = torch.nn.Linear(3, 2)
layer.bias.requires_grad_(False)
before = layer.weight.detach().clone()
optimizer = torch.optim.Adam(layer.parameters(), lr=0.1 * (rank + 1), weight_decay=0.5)
optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=layer.named_parameters())
hvd.broadcast_optimizer_state(optimizer, root_rank=1)
assert optimizer.param_groups[0]["lr"] == 0.2
assert not layer.weight.grad.any()
assert layer.bias.grad is None
assert torch.equal(layer.weight, before)
assert not optimizer.state_dict()["state"]
print("all good")
