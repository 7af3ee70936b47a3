"""Milliseconds per training step, 2 and 4 ranks on one GPU: DDP over Gloo with CUDA tensors, and Paceline.

A perceptron of 8.4 million parameters (33.6 MB), batch 64 per rank. All ranks share the GPU and the host's
memory, so these figures show what the way of communicating costs, not how training scales.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from gpu_pool import GpuPool
from torch import nn
from torch.nn import functional

import paceline
from paceline.train.job import Job

WAYS = {
    "DDP": "",
    "DDP, ddp_hook(int8)": "int8",
    "DDP, ddp_hook(error_feedback(codec=onebit))": "error_feedback(codec=onebit)",
    "all_reduce": None,
    "all_reduce(codec=fp16)": None,
    "all_reduce(codec=int8)": None,
    "all_reduce(codec=error_feedback(codec=onebit))": None,
    "all_reduce(codec=threshold(density=0.001))": None,
    "all_reduce(codec=error_feedback(codec=topk(density=0.001)))": None,
    "all_reduce(codec=powersgd(rank=2))": None,
    "local_sgd(period=8)": None,
    "streaming_diloco(period=8, fragments=4)": None,
    "parameter_server": None,
    "gossip": None,
    "decentralized_threshold(density=0.001)": None,
}


def body(job: Job, way: str, steps: int) -> dict[str, float]:
    """Median and mean milliseconds per step of this rank."""
    device = torch.device("cuda", 0)
    torch.manual_seed(1)
    model: Any = nn.Sequential(nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 1024)).to(device)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    if way.startswith("DDP"):
        job._comm_for(model)
        model = nn.parallel.DistributedDataParallel(model)
        if WAYS[way]:
            model.register_comm_hook(None, paceline.ddp_hook(str(WAYS[way])))
    else:
        model, optimizer = job.prepare(model, optimizer, strategy=way)
    x = torch.randn(64, 1024, device=device)
    times = []
    for step in range(steps + 4):
        torch.cuda.synchronize()
        start = time.perf_counter()
        functional.mse_loss(model(x), x).backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        if step >= 4:
            times.append(1e3 * (time.perf_counter() - start))
    if not way.startswith("DDP"):
        job.synchronize()
        for attachment in job.attachments:
            attachment.detach()
    return {"median_ms": statistics.median(times), "mean_ms": statistics.fmean(times)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print(f"{'ms per step (mean)':62}{'2 ranks':>9}{'4 ranks':>9}{'x DDP':>7}{'x DDP':>7}")
    pools = {size: GpuPool(size) for size in (2, 4)}
    for way in WAYS:
        found: dict[int, float] = {}
        for size, pool in pools.items():
            try:
                results = pool.run(body, way, options.steps)
            except AssertionError as error:
                rows.append({"ranks": size, "way": way, "error": str(error)[-600:]})
                continue
            found[size] = max(r["mean_ms"] for r in results)
            median = max(r["median_ms"] for r in results)
            rows.append({"ranks": size, "way": way, "mean_ms": found[size], "median_ms": median})
        base = {r["ranks"]: r["mean_ms"] for r in rows if r["way"] == "DDP" and "mean_ms" in r}
        cells = [f"{found[s]:9.1f}" if s in found else f"{'failed':>9}" for s in pools]
        cells += [f"{base[s] / found[s]:7.2f}" if s in found and s in base else f"{'':7}" for s in pools]
        print(f"{way:62}{''.join(cells)}", flush=True)
    for pool in pools.values():
        pool.close()
    if options.json:
        options.json.write_text(json.dumps({"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
