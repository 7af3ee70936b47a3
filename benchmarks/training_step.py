"""Step time of `all_reduce` against DistributedDataParallel: same ranks, same model, paired runs A B A B.

    python benchmarks/training_step.py                       # 25 M-parameter MLP, 2 ranks, Gloo under both
    python benchmarks/training_step.py --fabric native --json step.json

Each rank computes with one thread. A pair is `--steps` steps of DDP and then of Paceline, alternating; its
ratio compares the medians, so that a load that comes and goes on the machine hits both. The result is the
median of the pairs' ratios. With another fabric than torch, DDP keeps Gloo.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn


def build(width: int) -> nn.Sequential:
    """An MLP of 25 M parameters at width 2048."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(1024, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, 1000),
    )


def step_times_s(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: int, steps: int, barrier: Callable[[], None]
) -> list[float]:
    x, y = torch.randn(batch, 1024), torch.randint(1000, (batch,))
    times = []
    for _ in range(steps):
        barrier()
        start = time.perf_counter()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    return times


def worker(arguments: argparse.Namespace) -> None:
    import torch.distributed as dist

    import paceline

    torch.set_num_threads(1)
    job = paceline.init(fabric=arguments.fabric)
    if not dist.is_initialized():
        store = dist.PrefixStore("ddp", job.meeting.store)
        dist.init_process_group("gloo", store=store, rank=job.rank, world_size=job.size)
    theirs = nn.parallel.DistributedDataParallel(
        build(arguments.width), gradient_as_bucket_view=arguments.bucket_view
    )
    their_optimizer = torch.optim.SGD(theirs.parameters(), lr=0.01)
    ours = build(arguments.width)
    ours, our_optimizer = job.prepare(
        ours, torch.optim.SGD(ours.parameters(), lr=0.01), strategy=arguments.strategy
    )
    sides = {"ddp": (theirs, their_optimizer), "paceline": (ours, our_optimizer)}
    for model, optimizer in sides.values():
        step_times_s(model, optimizer, arguments.batch, 3, job.barrier)
    pairs = []
    for _ in range(arguments.pairs):
        medians = {}
        for name, (model, optimizer) in sides.items():
            times = step_times_s(model, optimizer, arguments.batch, arguments.steps, job.barrier)
            medians[name] = statistics.median(times)
        pairs.append({**medians, "ratio": medians["paceline"] / medians["ddp"]})
    if job.is_main:
        report(arguments, pairs, sum(p.numel() for p in ours.parameters()), job.size)
    job.barrier()
    job.close()


def report(arguments: argparse.Namespace, pairs: list[dict[str, float]], parameters: int, size: int) -> None:
    ratio = statistics.median(pair["ratio"] for pair in pairs)
    result = {
        "benchmark": "training_step",
        "ranks": size,
        "parameters": parameters,
        "batch_per_rank": arguments.batch,
        "steps_per_side": arguments.steps,
        "strategy": arguments.strategy,
        "ddp_bucket_view": arguments.bucket_view,
        "fabric": arguments.fabric or "torch",
        "torch": torch.__version__,
        "ddp_step_s": statistics.median(pair["ddp"] for pair in pairs),
        "paceline_step_s": statistics.median(pair["paceline"] for pair in pairs),
        "median_ratio": ratio,
        "pairs": pairs,
    }
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "pairs"}, indent=1))
    print("ratios of the pairs:", ", ".join(f"{pair['ratio']:.3f}" for pair in pairs))
    print(f"{arguments.strategy} / DDP, median step time ratio: {ratio:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--width", type=int, default=2048, help="2048 gives 25 M parameters")
    parser.add_argument("--batch", type=int, default=64, help="samples per rank")
    parser.add_argument("--steps", type=int, default=10, help="steps of each side in a pair")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--bucket-view", action="store_true", help="DDP with gradient_as_bucket_view=True")
    parser.add_argument("--strategy", default="all_reduce")
    parser.add_argument("--fabric", default=None, help="torch or native; default: the package's")
    parser.add_argument("--json", help="write the full result here")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        worker(arguments)
        return
    # Fresh gradients of tens of MB would otherwise be page faults in both sides' times.
    quiet_malloc = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "1073741824"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={arguments.ranks}", *sys.argv]
    environment = {**os.environ, **quiet_malloc, "OMP_NUM_THREADS": "1"}
    raise SystemExit(subprocess.run(command, env=environment, check=False).returncode)


if __name__ == "__main__":
    main()
