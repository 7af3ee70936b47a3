"""Rank 1 dies once, in the middle of training; a new worker takes its place at the last commit."""

import os
import signal

import horovod.torch as hvd
import torch

hvd.init()
model = torch.nn.Linear(4, 1, bias=False)
torch.nn.init.zeros_(model.weight)
optimizer = torch.optim.SGD(model.parameters(), lr=0.125)
optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
sampler = hvd.elastic.ElasticSampler(range(32), shuffle=False)
restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


@hvd.elastic.run
def train(state):
    print(f"rank {hvd.rank()} starts at step {state.step} after {restarts} restarts", flush=True)
    while state.step < 10:
        optimizer.zero_grad()
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        state.step += 1
        if state.step % 4 == 0:
            state.sampler.record_indices(range(state.step))
            state.commit()
        if state.step == 6 and restarts == 0 and hvd.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)


state = hvd.elastic.TorchState(model=model, optimizer=optimizer, sampler=sampler, step=0)
train(state)
assert torch.equal(model.weight, torch.full((1, 4), -0.125 * 10)), model.weight
assert state.sampler.processed_indices == set(range(8))
print("finished at step", state.step, flush=True)
