"""Plain DDP with our hook on two Gloo processes."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import paceline
from paceline.errors import ConfigError

pytestmark = pytest.mark.distributed

STEPS = 30
SPECS = ["powersgd(rank=2)", "error_feedback(codec=onebit)", "threshold(density=0.05)", "fp16"]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))


def train(rank: int, spec: str, steps: range, hook_state: Any, module: nn.Module) -> tuple[list[float], Any]:
    ddp = DistributedDataParallel(module, bucket_cap_mb=0.01)
    hook = paceline.ddp_hook(spec)
    if hook_state is not None:
        hook.load_state_dict(hook_state)
    ddp.register_comm_hook(None, hook)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(10 * step + rank)
        x = torch.randn(32, 20, generator=generator)
        loss = (ddp(x) - x[:, :3].sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, hook


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        results = {}
        for spec in SPECS:
            module = model()
            losses, hook = train(rank, spec, range(STEPS), None, module)
            torch.save(hook.state_dict(), Path(folder) / f"hook{rank}.pt")
            state = torch.load(Path(folder) / f"hook{rank}.pt", weights_only=True)
            more, hook = train(rank, spec, range(STEPS, 2 * STEPS), state, module)
            parameters = torch.cat([p.detach().view(-1) for p in module.parameters()])
            results[spec] = {"losses": losses + more, "parameters": parameters, "stats": hook.stats()}
        torch.save(results, Path(folder) / f"results{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.timeout(200)
@pytest.mark.xdist_group("processes")
def test_hook(tmp_path: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(worker, args=(port, str(tmp_path)), nprocs=2, join=True)
    a, b = (torch.load(tmp_path / f"results{r}.pt", weights_only=True) for r in range(2))
    for spec in SPECS:
        assert torch.equal(a[spec]["parameters"], b[spec]["parameters"]), spec
        losses = a[spec]["losses"]
        assert sum(losses[-10:]) < 0.3 * sum(losses[:10]), spec
        stats = a[spec]["stats"]
        assert 0 < stats["encoded_bytes"] < 0.6 * stats["raw_bytes"], spec
        assert (stats["extra_memory_bytes"] > 0) == (spec != "fp16"), spec


def test_bad_specs() -> None:
    with pytest.raises(ConfigError, match="rank=0: a whole number >= 1"):
        paceline.ddp_hook("powersgd(rank=0)")
    with pytest.raises(ConfigError, match="Did you mean 'powersgd'"):
        paceline.ddp_hook("power_sgd")
    with pytest.raises(ConfigError, match="not the state"):
        paceline.ddp_hook("int8").load_state_dict({"a": 1})
