"""A Horovod script as its documentation writes them: fp16 compression, two backward passes a step."""

import sys

import horovod.torch as hvd
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

hvd.init()
torch.manual_seed(42 + hvd.rank())
data = np.load(sys.argv[1])


def split(name):
    images = torch.from_numpy(data[f"x_{name}"]).float().div(255).view(-1, 784)
    return TensorDataset(images, torch.from_numpy(data[f"y_{name}"]).long())


train_set, test_set = split("train"), split("test")
sampler = DistributedSampler(train_set, num_replicas=hvd.size(), rank=hvd.rank())
model = torch.nn.Sequential(torch.nn.Linear(784, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1 * hvd.size(), momentum=0.9)
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
hvd.broadcast_optimizer_state(optimizer, root_rank=0)
optimizer = hvd.DistributedOptimizer(
    optimizer,
    named_parameters=model.named_parameters(),
    compression=hvd.Compression.fp16,
    backward_passes_per_step=2,
)
for epoch in range(3):
    sampler.set_epoch(epoch)
    batches = list(DataLoader(train_set, batch_size=64, sampler=sampler, drop_last=True))
    for first, second in zip(batches[::2], batches[1::2], strict=False):
        optimizer.zero_grad()
        for x, y in (first, second):
            (F.cross_entropy(model(x), y) / 2).backward()
        optimizer.step()
x, y = test_set[hvd.rank() :: hvd.size()]
totals = hvd.allreduce(torch.tensor([(model(x).argmax(1) == y).sum(), len(y)]), op=hvd.Sum)
if hvd.rank() == 0:
    print(f"accuracy {totals[0] / totals[1]:.4f}")
