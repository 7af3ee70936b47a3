"""The same training by DDP and by the Horovod interface: equal bits at fp32 on two ranks."""

import copy

import horovod.torch as hvd
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

hvd.init()
dist.init_process_group("gloo")
torch.manual_seed(hvd.rank())
model = nn.Sequential(nn.Linear(20, 50), nn.ReLU(), nn.Linear(50, 30), nn.Tanh(), nn.Linear(30, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1 * (hvd.rank() + 1), momentum=0.9)
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
hvd.broadcast_optimizer_state(optimizer, root_rank=0)
assert optimizer.param_groups[0]["lr"] == 0.1
twin = copy.deepcopy(model)
scheduler_class = torch.optim.lr_scheduler.StepLR
optimizer = hvd.DistributedOptimizer(
    optimizer, named_parameters=model.named_parameters(), backward_passes_per_step=2
)
assert isinstance(optimizer, torch.optim.SGD)
scheduler = scheduler_class(optimizer, 3, 0.5)
# The training group belongs to the interface; DDP gets one of its own.
ddp = DistributedDataParallel(twin, process_group=dist.new_group())
plain = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)
plain_scheduler = scheduler_class(plain, 3, 0.5)
torch.manual_seed(100 + hvd.rank())
loss_fn = nn.CrossEntropyLoss()
for _ in range(8):
    x, y = torch.randn(2, 16, 20), torch.randint(4, (2, 16))
    optimizer.zero_grad()
    for i in range(2):
        loss_fn(model(x[i]), y[i]).backward()
    optimizer.synchronize()
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    with optimizer.skip_synchronize():
        optimizer.step()
    scheduler.step()
    plain.zero_grad()
    with ddp.no_sync():
        loss_fn(ddp(x[0]), y[0]).backward()
    loss_fn(ddp(x[1]), y[1]).backward()
    nn.utils.clip_grad_norm_(ddp.parameters(), 0.5)
    plain.step()
    plain_scheduler.step()
for a, b in zip(model.parameters(), twin.parameters(), strict=True):
    assert torch.equal(a, b), (a - b).abs().max()

# Misuse is an error with Horovod's words.
try:
    hvd.DistributedOptimizer(plain, named_parameters=[("a", p) for p in ddp.parameters()])
    raise SystemExit("duplicate names were not noticed")
except ValueError as error:
    assert "unique" in str(error)
loss_fn(model(x[0]), y[0]).backward()
loss_fn(model(x[0]), y[0]).backward()
try:
    loss_fn(model(x[0]), y[0]).backward()
    raise SystemExit("a third backward pass was not noticed")
except AssertionError as error:
    assert "backward_passes_per_step" in str(error)
try:
    optimizer.zero_grad()
    raise SystemExit("zero_grad before step was not noticed")
except AssertionError as error:
    assert "race" in str(error)
optimizer.step()
del ddp
print("equal bits")
