"""Training with what torch.distributed offers; every function returns losses, the same on any backend."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel as DDP

STEPS = 4


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


def data(rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randn(8, 16, generator=generator), torch.randint(4, (8,), generator=generator)


def train(net: nn.Module, rank: int, optimizer: torch.optim.Optimizer | None = None) -> list[float]:
    optimizer = optimizer or torch.optim.SGD(net.parameters(), lr=0.1)
    losses = []
    for step in range(STEPS):
        x, y = data(rank, step)
        loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def ddp(rank: int, size: int, **options: object) -> list[float]:
    return train(DDP(model(), **options), rank)


def ddp_hook(rank: int, size: int, hook: Callable, state: object = None) -> list[float]:
    net = DDP(model(), bucket_cap_mb=0.001)
    net.register_comm_hook(state, hook)
    return train(net, rank)


def ddp_fp16_hook(rank: int, size: int) -> list[float]:
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    return ddp_hook(rank, size, default_hooks.fp16_compress_hook)


def ddp_python_hook(rank: int, size: int) -> list[float]:
    def hook(state, bucket):  # DDP looks at annotations, which are strings in this file
        work = dist.all_reduce(bucket.buffer(), async_op=True)
        return work.get_future().then(lambda f: f.value()[0] / size)

    return ddp_hook(rank, size, hook)


def ddp_builtin_hook(rank: int, size: int) -> list[float]:
    net = DDP(model())
    net._register_builtin_comm_hook(dist.BuiltinCommHookType.FP16_COMPRESS)
    return train(net, rank)


def ddp_power_sgd(rank: int, size: int) -> list[float]:
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as power

    state = power.PowerSGDState(None, matrix_approximation_rank=2, start_powerSGD_iter=2)
    net = DDP(model())
    net.register_comm_hook(state, power.powerSGD_hook)
    return train(net, rank)


def ddp_no_sync(rank: int, size: int) -> list[float]:
    net = DDP(model())
    with net.no_sync():
        F.cross_entropy(net(data(rank, 9)[0]), data(rank, 9)[1]).backward()
    return train(net, rank)


def ddp_join(rank: int, size: int, **options: bool) -> list[float]:
    net = DDP(model())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    losses = []
    with net.join(**options):
        for step in range(2 + rank):  # uneven
            x, y = data(rank, step)
            loss = F.cross_entropy(net(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def waited_for_in_cpp(rank: int, size: int) -> list[float]:
    total = torch.full((4,), float(rank + 1))
    work = dist.all_reduce(total, async_op=True)
    torch._C._distributed_c10d._register_work(total, work)
    del work  # C++ keeps its half
    return torch.ops._c10d_functional.wait_tensor(total).tolist()


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = model()
        self.unused = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.trunk(x))


def ddp_unused_parameters(rank: int, size: int) -> list[float]:
    torch.manual_seed(0)
    return train(DDP(Branching(), find_unused_parameters=True), rank)


def ddp_sparse_embedding(rank: int, size: int) -> list[float]:
    torch.manual_seed(0)
    net = DDP(nn.EmbeddingBag(10, 4, sparse=True, mode="sum"))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    losses = []
    for step in range(STEPS):
        loss = F.cross_entropy(net(torch.tensor([[rank, step], [step, 9]])), torch.tensor([0, 1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def ddp_compiled(rank: int, size: int) -> list[float]:
    return train(torch.compile(DDP(model()), backend="aot_eager"), rank)


def zero_optimizer(rank: int, size: int) -> list[float]:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    net = DDP(model())
    return train(net, rank, ZeroRedundancyOptimizer(net.parameters(), torch.optim.Adam, lr=0.01))


def zero_optimizer_overlapped(rank: int, size: int) -> list[float]:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    net = DDP(model())
    optimizer = ZeroRedundancyOptimizer(
        net.parameters(), torch.optim.Adam, lr=0.01, parameters_as_bucket_view=True
    )
    return train(net, rank, optimizer)


def fsdp1(rank: int, size: int) -> list[float]:
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    return train(FSDP(model(), device_id=torch.device("cpu"), use_orig_params=True), rank)


def fsdp2(rank: int, size: int, mesh: object = None) -> list[float]:
    from torch.distributed.fsdp import fully_shard

    mesh = mesh or init_device_mesh("cpu", (size,))
    net = model()
    for layer in net:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return train(net, rank)


def hsdp(rank: int, size: int) -> list[float]:
    return fsdp2(rank, size, init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("replicate", "shard")))


def tensor_parallel(rank: int, size: int) -> list[float]:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    net = parallelize_module(
        model(), init_device_mesh("cpu", (size,)), {"0": ColwiseParallel(), "2": RowwiseParallel()}
    )
    return train(net, 0)


def dtensor(rank: int, size: int) -> list[float]:
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (size,))
    torch.manual_seed(0)
    a, b = torch.randn(8, 8), torch.randn(8, 8)
    x, y = distribute_tensor(a, mesh, [Shard(0)]), distribute_tensor(b, mesh, [Shard(1)])
    product = x @ y
    assert isinstance(product, DTensor)
    whole = product.redistribute(mesh, [Replicate()]).to_local()
    torch.testing.assert_close(whole, a @ b)
    return [whole.sum().item(), product.redistribute(mesh, [Shard(1)]).to_local().sum().item()]


def pipeline(rank: int, size: int) -> list[float]:
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    whole = model()
    parts = [whole[:2], whole[2:]] if size == 2 else [whole[:2], whole[2:3], whole[3:4], whole[4:]]
    stage = PipelineStage(parts[rank], rank, size, torch.device("cpu"))
    schedule = Schedule1F1B(stage, n_microbatches=4, loss_fn=F.cross_entropy)
    # A stage of an activation alone has no parameters.
    optimizer = torch.optim.SGD(list(parts[rank].parameters()) or [torch.zeros(1)], lr=0.1)
    out = []
    for step in range(STEPS):
        x, y = data(0, step)
        losses: list[torch.Tensor] = []
        optimizer.zero_grad()
        if rank == 0:
            schedule.step(x)
        elif rank == size - 1:
            schedule.step(target=y, losses=losses)
        else:
            schedule.step()
        optimizer.step()
        out.append(sum(loss.item() for loss in losses))
    return out


def checkpoint(rank: int, size: int) -> list[float]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.fsdp import fully_shard

    net = model()
    fully_shard(net, mesh=init_device_mesh("cpu", (size,)))
    folders = [tempfile.mkdtemp() if rank == 0 else None, tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(folders)
    dcp.save(net.state_dict(), checkpoint_id=folders[0])
    before = train(net, rank)
    dcp.async_save(net.state_dict(), checkpoint_id=folders[1]).result()
    state = net.state_dict()
    dcp.load(state, checkpoint_id=folders[0])
    net.load_state_dict(state)
    assert train(net, rank) == before
    return before


def compiled_functional(rank: int, size: int) -> list[float]:
    import torch.distributed._functional_collectives as functional

    @functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    def body(t: torch.Tensor) -> torch.Tensor:
        total = functional.all_reduce(t * 2, "sum", dist.group.WORLD)
        return functional.all_gather_tensor(total + 1, 0, dist.group.WORLD)

    return body(torch.full((3,), float(rank))).tolist()


def differentiable_collectives(rank: int, size: int) -> list[float]:
    import torch.distributed.nn.functional as differentiable

    x = torch.full((3,), rank + 1.0, requires_grad=True)
    (differentiable.all_reduce(x * x).sum() + sum(differentiable.all_gather(x)).sum()).backward()
    return x.grad.tolist()


def averaging(rank: int, size: int) -> list[float]:
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

    net = model(rank)
    before = train(net, rank)  # only parameters that have a gradient are averaged
    PeriodicModelAverager(period=1, warmup_steps=0).average_parameters(list(net.parameters()))
    return before + train(net, rank)


BODIES: dict[str, Callable[[int, int], list[float]]] = {
    "ddp": ddp,
    "ddp_static_graph": functools.partial(ddp, static_graph=True),
    "ddp_bucket_view": functools.partial(ddp, gradient_as_bucket_view=True),
    "ddp_join_by_those_active": functools.partial(ddp_join, divide_by_initial_world_size=False),
    "ddp_many_buckets": functools.partial(ddp, bucket_cap_mb=0.0005),
    **{
        body.__name__: body
        for body in (
            ddp_fp16_hook,
            ddp_python_hook,
            ddp_builtin_hook,
            ddp_power_sgd,
            ddp_no_sync,
            ddp_join,
            waited_for_in_cpp,
            ddp_unused_parameters,
            ddp_sparse_embedding,
            ddp_compiled,
            zero_optimizer,
            zero_optimizer_overlapped,
            fsdp1,
            fsdp2,
            tensor_parallel,
            dtensor,
            pipeline,
            checkpoint,
            compiled_functional,
            differentiable_collectives,
            averaging,
        )
    },
}
ONLY_FOUR = {"hsdp": hsdp}


def run_all(rank: int, size: int) -> dict[str, object]:
    """Losses of every body on this rank, or the traceback."""
    import traceback

    out: dict[str, object] = {}
    for name, body in {**BODIES, **(ONLY_FOUR if size == 4 else {})}.items():
        try:
            out[name] = body(rank, size)
        except Exception:
            out[name] = traceback.format_exc()
        dist.barrier()
    return out
