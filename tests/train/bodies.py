"""What the ranks run; each body gets a fresh Job and returns plain values."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from rank_pool import alone
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from paceline.train.job import Job


def data(count: int, dtype: torch.dtype = torch.float64) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 6, generator=generator, dtype=torch.float64).to(dtype)
    return TensorDataset(x, (x.sum(1) > 0).long())


def mlp(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 2)).to(dtype)


def flat(model: nn.Module) -> list[float]:
    return torch.cat([p.detach().double().reshape(-1) for p in model.parameters()]).tolist()


def digest(model: nn.Module) -> str:
    """Of the exact bytes of parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return hashlib.sha256(b"".join(t.detach().contiguous().numpy().tobytes() for t in tensors)).hexdigest()


def fit(
    job: Job,
    model: nn.Module,
    *,
    count: int,
    strategy: str,
    epochs: int = 2,
    global_batch: int = 12,
    accumulation_steps: int = 1,
    clip: float | None = None,
    momentum: float = 0.0,
    set_to_none: bool = True,
) -> list[float]:
    """Train with the plainest of loops; the norms that clipping saw."""
    parameter = next(model.parameters())
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.3, momentum=momentum)
    loader: Any = DataLoader(data(count, parameter.dtype), global_batch // job.size, shuffle=True)
    model, optimizer, loader = job.prepare(
        model, optimizer, loader, strategy=strategy, accumulation_steps=accumulation_steps
    )
    norms = []
    for _ in job.epochs(epochs):
        for i, (x, y) in enumerate(loader):
            loss = functional.cross_entropy(model(x), y) / accumulation_steps
            loss.backward()
            if (i + 1) % accumulation_steps == 0 or i + 1 == len(loader):
                if clip is not None:
                    norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip)))
                optimizer.step()
                optimizer.zero_grad(set_to_none=set_to_none)
    return norms


def against_one_machine(job: Job, strategy: str, **settings: Any) -> dict[str, Any]:
    ours, reference = mlp(), mlp()
    norms = fit(job, ours, strategy=strategy, **settings)
    one_norms = fit(alone(job), reference, strategy="single", **settings)
    return {
        "ours": flat(ours),
        "one": flat(reference),
        "digest": digest(ours),
        "norms": norms,
        "one_norms": one_norms,
        "stats": job.stats(),
    }


def batchnorm_replica(job: Job, strategy: str) -> str:
    torch.manual_seed(job.rank)  # prepare must make the ranks equal
    layers = [nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout(0.3), nn.Linear(9, 2)]
    model = nn.Sequential(*layers)
    optimizer: Any = torch.optim.Adam(model.parameters(), lr=0.01)
    loader: Any = DataLoader(data(62, torch.float32), 5, shuffle=True)
    model, optimizer, loader = job.prepare(model, optimizer, loader, strategy=strategy)
    for _ in job.epochs(2):
        for x, y in loader:
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    return digest(model)


def sends(job: Job, strategy: str, steps: int) -> dict[str, Any]:
    model = nn.Linear(64, 16)
    x = torch.randn(steps * 2 * job.size, 64, generator=torch.Generator().manual_seed(1))
    loader: Any = DataLoader(TensorDataset(x), 2)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model, optimizer, loader = job.prepare(model, optimizer, loader, strategy=strategy)
    for _ in job.epochs(1):
        for (x,) in loader:
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    claim = job.strategy.traffic(job.stats()["model_bytes"], job.size)
    return {"claim": claim * steps, "stats": job.stats()}


def unused_on_some_ranks(job: Job) -> dict[str, Any]:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.everywhere, self.somewhere, self.nowhere = (nn.Linear(3, 1) for _ in range(3))
            self.frozen = nn.Linear(3, 1).requires_grad_(False)
            self.tied = self.everywhere

    torch.manual_seed(3)
    model = Fork()
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = job.prepare(model, optimizer, strategy="all_reduce(bucket_mib=0.00001)")
    x = torch.ones(2, 3)
    out = model.everywhere(x) + (model.somewhere(x) if job.rank == 1 else 0) + model.frozen(x)
    out.mean().backward()
    result = {
        "everywhere": model.everywhere.weight.grad.tolist(),
        "somewhere": model.somewhere.weight.grad.tolist(),
        "nowhere": model.nowhere.weight.grad,
        "frozen": model.frozen.weight.grad,
        "buckets": len(job.attachments[-1].replica.buckets),
        "keys": sorted(model.state_dict()),
    }
    optimizer.step()
    optimizer.zero_grad()
    return {**result, "digest": digest(model)}


def overflow_on_one_rank(job: Job, strategy: str) -> dict[str, Any]:
    """Rank 1 sees an infinite input in its second minibatch of four."""
    model = mlp(torch.float32)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    samples = torch.ones(4 * job.size, 6)
    samples[job.size + 1] = float("inf")  # round 1, rank 1
    loader: Any = DataLoader(TensorDataset(samples, torch.zeros(len(samples), dtype=torch.long)), 1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
    model, optimizer, loader = job.prepare(model, optimizer, loader, strategy=strategy, scaler=scaler)
    scales, weights = [], []
    for _ in job.epochs(1):
        for x, y in loader:
            scaler.scale(functional.cross_entropy(model(x), y)).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            scales.append(scaler.get_scale())
            weights.append(digest(model))
    finite = all(bool(p.isfinite().all()) for p in model.parameters())
    return {"scales": scales, "weights": weights, "finite": finite, "final": digest(model)}


def no_sync(job: Job) -> dict[str, Any]:
    model = nn.Linear(3, 1, bias=False)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = job.prepare(model, optimizer)
    before = job.comm.ledger.operations["all_reduce"].calls
    x = torch.full((1, 3), float(job.rank + 1))
    with job.no_sync():
        model(x).mean().backward()
    local = model.weight.grad.tolist()
    model(x).mean().backward()
    return {
        "local": local,
        "final": model.weight.grad.tolist(),
        "calls": job.comm.ledger.operations["all_reduce"].calls - before,
    }


def undeclared_backwards(job: Job) -> list[float]:
    """Two losses, two backward passes, one step: sent twice, but right."""
    model = nn.Linear(3, 1, bias=False)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = job.prepare(model, optimizer)
    x = torch.full((1, 3), float(job.rank + 1))
    model(x).mean().backward()
    model(2 * x).mean().backward()
    gradient: list[float] = model.weight.grad.reshape(-1).tolist()
    return gradient


def odd_parameters(job: Job) -> dict[str, Any]:
    """channels_last, mixed dtypes, two optimizers, zero_grad(set_to_none=False), replaced memory."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3), "wide": nn.Linear(4, 2).double()})
    model["conv"].to(memory_format=torch.channels_last)
    optimizers = [
        torch.optim.Adam(model["conv"].parameters()),
        torch.optim.SGD(model["wide"].parameters(), 0.1),
    ]
    model, optimizers = job.prepare(model, optimizers)
    layouts = []
    for step in range(3):
        x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
        model["wide"](model["conv"](x).mean((2, 3)).double()).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        layouts.append(model["conv"].weight.is_contiguous(memory_format=torch.channels_last))
        if step == 1:
            for p in model.parameters():
                p.data = p.data.clone()
    job.synchronize()
    return {"digest": digest(model), "layouts": layouts, "minibatches": job.stats()["minibatches"]}


def compiled(job: Job) -> tuple[str, str, bool]:
    """torch.compile before prepare trains like eager; unwrap gives the module back."""
    digests = []
    for compiles in (True, False):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
        model: Any = torch.compile(module) if compiles else module
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
        model, optimizer = job.prepare(model, optimizer)
        for step in range(3):
            model(torch.full((2, 6), float(step + job.rank))).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert job.unwrap(model) is module
        digests.append([round(x, 5) for x in flat(module)])
    return str(digests[0]), str(digests[1]), "0.weight" in module.state_dict()


def error_of(job: Job, what: str) -> str:
    """The message of the error that a wrong use gives."""
    model: Any = nn.Linear(3, 1)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    try:
        if what == "sparse":
            job.prepare(nn.Embedding(3, 2, sparse=True))
        elif what == "single":
            job.prepare(model, optimizer, strategy="single")
        elif what == "name":
            job.prepare(model, optimizer, strategy="all_reduced")
        elif what == "argument":
            job.prepare(model, optimizer, strategy="local_sgd(periode=3)")
        elif what == "period":
            job.prepare(model, optimizer, strategy="local_sgd(period=0)")
        elif what == "different":
            job.prepare(nn.Linear(3, 1 + job.rank))
        elif what == "stranger":
            job.prepare(model, torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))
        elif what == "late":
            job.prepare(model, optimizer)
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
        elif what == "no samples":
            job.prepare(model, optimizer, DataLoader(TensorDataset(torch.ones(0, 3)), 4))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"
