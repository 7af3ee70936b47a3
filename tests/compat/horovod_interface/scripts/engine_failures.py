"""An exception in one rank's engine reaches every caller of every rank; a new `init` starts again."""

import threading

import horovod.torch as hvd
import torch

from paceline.compat.horovod import engine


def refused(call, *kinds):
    try:
        call()
    except kinds as error:
        return str(error)
    raise SystemExit(f"rank {hvd.rank()}: no error")


hvd.init()
size = hvd.size()

# What belongs to the caller's thread, or cannot be sent, never harms the engine.
with torch.inference_mode():
    for result in (
        hvd.allreduce(torch.ones(3), op=hvd.Sum),
        hvd.grouped_allreduce([torch.ones(3)], op=hvd.Sum)[0],
        hvd.allreduce_(torch.ones(3), op=hvd.Sum),
    ):
        assert torch.equal(result, torch.full((3,), float(size)))
    assert hvd.allgather(torch.ones(2, 2)).shape == (2 * size, 2)
    assert torch.equal(hvd.broadcast_(torch.full((2,), float(hvd.rank())), 1), torch.ones(2))
    kept = torch.ones(3)
hvd.allreduce_(kept, op=hvd.Sum)
assert hvd.allgather(torch.ones(1)).is_inference() is False
assert torch.equal(hvd.allreduce(torch.ones(1).expand(4), op=hvd.Sum), torch.full((4,), float(size)))
sparse = torch.eye(3).to_sparse()
for call in (
    lambda: hvd.allreduce(sparse),
    lambda: hvd.allreduce_(torch.ones(1).expand(4)),
    lambda: hvd.broadcast_(torch.ones(1).expand(4), 0),
    lambda: hvd.grouped_allreduce([]),
    lambda: hvd.grouped_allgather([]),
    lambda: hvd.grouped_reducescatter([]),
):
    refused(call, ValueError)
for call in (
    lambda: hvd.reducescatter(torch.tensor(1.0)),
    lambda: hvd.grouped_reducescatter([torch.ones(2), torch.tensor(1.0)]),
    lambda: hvd.alltoall(torch.tensor(1.0)),
):
    refused(call, hvd.HorovodInternalError)
assert hvd.allreduce(torch.empty(0)).numel() == 0
assert hvd.allgather(torch.empty(0, 3)).shape == (0, 3)
assert hvd.reducescatter(torch.ones(0, 3)).shape == (0, 3)
assert hvd.alltoall(torch.empty(0, 3)).shape == (0, 3)
assert hvd.broadcast(torch.tensor(1.0 + hvd.rank()), 0) == 1
hvd.allreduce(torch.ones(1), name="still alive")


def fail(*_):
    raise KeyError("out of nowhere")


def in_collective():
    whole, engine.perform = engine.perform, fail if hvd.rank() == 1 else engine.perform
    waiting = hvd.allreduce_async(torch.ones(1), name="waits" if hvd.rank() == 0 else "waits elsewhere")
    assert "out of nowhere" in refused(
        lambda: hvd.allreduce(torch.ones(1), name="hit"), hvd.HorovodInternalError
    )
    assert "rank 1" in refused(lambda: hvd.synchronize(waiting), hvd.HorovodInternalError)
    assert "out of nowhere" in refused(hvd.barrier, hvd.HorovodInternalError)
    engine.perform = whole


def in_coordinator():
    whole = engine.Coordinator.submit
    if hvd.rank() == 0:
        engine.Coordinator.submit = fail
    reason = refused(lambda: hvd.allreduce(torch.ones(1), name="asked"), hvd.HorovodInternalError)
    assert "out of nowhere" in reason, reason
    engine.Coordinator.submit = whole


for scenario in (in_collective, in_coordinator):
    hvd.allreduce(torch.ones(1), name="all well")
    scenario()
    before = threading.active_count()
    hvd.shutdown()
    hvd.init()
assert hvd.allreduce(torch.ones(1), op=hvd.Sum) == size
print("all good")
