"""What the ranks run, on `device` "cpu" or "cuda"; each body gets a fresh Job and returns plain values."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from paceline.tasks.builtin import digits
from paceline.tasks.task import accuracy
from paceline.train.job import Job


def device_of(name: str) -> torch.device:
    return torch.device("cuda", 0) if name == "cuda" else torch.device("cpu")


def digest(model: nn.Module) -> str:
    """Of the exact bytes of parameters and buffers."""
    tensors = [t.detach().cpu().contiguous() for t in [*model.parameters(), *model.buffers()]]
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()


def train(
    job: Job,
    device: str,
    strategy: str,
    *,
    epochs: int = 8,
    precision: str | None = None,
    compiles: bool = False,
    scaler: bool = False,
    lr: float = 0.02,
) -> dict[str, Any]:
    """Digits with the plainest of loops."""
    place = device_of(device)
    torch.manual_seed(2)
    task = digits.build()
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    model.to(place)
    run: Any = torch.compile(model) if compiles else model
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    loader: Any = DataLoader(task.train_set, 32 // job.size, shuffle=True)
    scaling = torch.amp.GradScaler("cuda", enabled=scaler)
    run, optimizer, loader = job.prepare(run, optimizer, loader, strategy=strategy, precision=precision)
    for _ in job.epochs(epochs):
        for x, y in loader:
            with torch.autocast(place.type, torch.float16, enabled=scaler):
                loss = functional.cross_entropy(run(x.to(place)), y.to(place))
            scaling.scale(loss).backward()
            scaling.step(optimizer)
            scaling.update()
            optimizer.zero_grad()
    result = job.evaluate(run, task.test_set, {"accuracy": accuracy})
    attachment = job.attachments[-1]
    return {
        "accuracy": result["accuracy"],
        "digest": digest(model),
        "devices": sorted({flat.device.type for flat in attachment.replica.parameters}),
        "fabric": attachment.comm.fabric,
        "finite": all(bool(p.isfinite().all()) for p in model.parameters()),
    }


def network(place: torch.device) -> nn.Sequential:
    """Convolutions (channels_last) and BatchNorm."""
    torch.manual_seed(3)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(4, 2))
    return model.to(place).to(memory_format=torch.channels_last)


def images(count: int = 64) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3, 8, 8, generator=generator)
    return TensorDataset(x, (x.mean((1, 2, 3)) > 0).long())


def steps(job: Job, model: Any, optimizer: Any, loader: Any, epochs: int) -> None:
    place = next(job.unwrap(model).parameters()).device
    for _ in job.epochs(epochs):
        for x, y in loader:
            functional.cross_entropy(model(x.to(place)), y.to(place)).backward()
            optimizer.step()
            optimizer.zero_grad()


def saved_and_loaded(job: Job, folder: str, strategy: str, saves_on: str, loads_on: str) -> dict[str, Any]:
    """Train two epochs, save, train a third; a second job loads on another device and trains the third."""
    digests = {}
    for part, device in (("saves", saves_on), ("loads", loads_on)):
        own = Job(job.comm, seed=5)
        own._comms.update(job._comms)
        model = network(device_of(device))
        optimizer: Any = torch.optim.Adam(model.parameters(), lr=0.01)
        loader: Any = DataLoader(images(), 8 // job.size, shuffle=True)
        model, optimizer, loader = own.prepare(model, optimizer, loader, strategy=strategy)
        if part == "saves":
            steps(own, model, optimizer, loader, 2)
            own.save(folder)
            digests["saved"] = digest(model)
            own.set_resumed(2, 0.0)
        else:
            own.load(folder)
            digests["loaded"] = digest(model)
        steps(own, model, optimizer, loader, 3)
        digests[part] = [round(float(v), 3) for p in model.parameters() for v in p.detach().cpu().reshape(-1)]
        for attachment in own.attachments:
            attachment.detach()
    return digests


class Rows:
    """A metric object as torchmetrics has them: it sees the outputs of all ranks."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.seen = torch.zeros(2)

    def update(self, outputs: torch.Tensor, targets: torch.Tensor) -> None:
        self.seen += torch.tensor([float((outputs.argmax(-1) == targets).sum()), len(targets)])

    def compute(self) -> float:
        return float(self.seen[0] / self.seen[1])


def evaluated(job: Job, device: str) -> dict[str, Any]:
    """BatchNorm statistics and objects that need all outputs; training goes on undisturbed."""
    model: Any = network(device_of(device))
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.05)
    loader: Any = DataLoader(images(), 8 // job.size, shuffle=True)
    model, optimizer, loader = job.prepare(model, optimizer, loader, strategy="local_sgd(period=4)")
    steps(job, model, optimizer, loader, 1)
    before = digest(model)
    result = job.evaluate(model, images(50), {"accuracy": accuracy, "object": Rows()})
    return {**result, "undisturbed": digest(model) == before}


OPERATIONS = (
    "all_reduce",
    "mean",
    "max",
    "reduce",
    "broadcast",
    "all_gather",
    "all_gather_v",
    "reduce_scatter",
    "reduce_scatter_v",
    "gather",
    "scatter",
    "all_to_all",
    "all_to_all_v",
    "send and recv",
    "barrier",
    "split",
)


def operation(job: Job, name: str, device: str) -> list[float]:
    """One collective on small tensors; the values that this rank holds afterwards."""
    from paceline.types import ReduceOp

    place = device_of(device)
    comm: Any = job._comms[place] if place.type == "cuda" else job.comm
    rank, size = comm.rank, comm.size

    def ramp(count: int) -> torch.Tensor:
        return torch.arange(count, dtype=torch.float32, device=place) + 10 * rank

    own, counts = ramp(4), [r + 1 for r in range(size)]
    if name in ("all_reduce", "mean", "max"):
        op = {"all_reduce": ReduceOp.SUM, "mean": ReduceOp.MEAN, "max": ReduceOp.MAX}[name]
        comm.all_reduce(own, op=op).wait()
        return own.tolist()
    if name == "reduce":
        comm.reduce(own, root=size - 1).wait()
        return own.tolist() if rank == size - 1 else []
    if name == "broadcast":
        comm.broadcast(own, root=size - 1).wait()
        return own.tolist()
    if name in ("all_gather", "all_gather_v"):
        shares = [4] * size if name == "all_gather" else counts
        out = torch.zeros(sum(shares), device=place)
        extra = {} if name == "all_gather" else {"counts": shares}
        getattr(comm, name)(out, ramp(shares[rank]), **extra).wait()
        return out.tolist()
    if name in ("reduce_scatter", "reduce_scatter_v"):
        shares = [4] * size if name == "reduce_scatter" else counts
        out = torch.zeros(shares[rank], device=place)
        extra = {} if name == "reduce_scatter" else {"counts": shares}
        getattr(comm, name)(out, ramp(sum(shares)), **extra).wait()
        return out.tolist()
    return _more_operations(comm, name, place, own, ramp)


def _more_operations(comm: Any, name: str, place: torch.device, own: torch.Tensor, ramp: Any) -> list[float]:
    rank, size = comm.rank, comm.size
    if name == "gather":
        out = torch.zeros(4 * size, device=place) if rank == 0 else None
        comm.gather(out, own).wait()
        return [] if out is None else out.tolist()
    if name == "scatter":
        out = torch.zeros(4, device=place)
        comm.scatter(out, ramp(4 * size) if rank == 0 else None).wait()
        return out.tolist()
    if name in ("all_to_all", "all_to_all_v"):
        out = torch.zeros(2 * size, device=place)
        extra = {} if name == "all_to_all" else {"output_counts": [2] * size, "source_counts": [2] * size}
        getattr(comm, name)(out, ramp(2 * size), **extra).wait()
        return out.tolist()
    if name == "send and recv":
        got = torch.zeros(4, device=place)
        if size > 1:
            works = [comm.send(own, (rank + 1) % size), comm.recv(got, (rank - 1) % size)]
            for work in works:
                work.wait()
        return got.tolist()
    if name == "split":
        part = comm.split(list(range(size)))
        part.all_reduce(own).wait()
        return own.tolist()
    comm.barrier().wait()
    return []


def ddp(job: Job, codec: str) -> dict[str, Any]:
    """DistributedDataParallel on the GPU, over the group that the job opened, with our hook ("": without)."""
    import paceline

    place = device_of("cuda")
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).to(place)
    wrapped = nn.parallel.DistributedDataParallel(model)
    if codec:
        wrapped.register_comm_hook(None, paceline.ddp_hook(codec))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    generator = torch.Generator().manual_seed(job.rank)
    weights = torch.randn(64, 10, generator=torch.Generator().manual_seed(9))
    for _ in range(60):
        x = torch.randn(32, 64, generator=generator)
        loss = functional.cross_entropy(wrapped(x.to(place)), (x @ weights).argmax(1).to(place))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return {"digest": digest(model), "first": losses[0], "last": sum(losses[-10:]) / 10}
