"""Step time of `all_reduce` against DistributedDataParallel: same ranks, same model, paired runs A B A B.

    python benchmarks/training_step.py                       # 25 M-parameter MLP, 2 ranks, Gloo under both
    python benchmarks/training_step.py --fabric native --batch 16 32 64 --json step.json
    python benchmarks/training_step.py --fabric native --apart      # each side in processes of its own

Each rank computes with one thread. A round is `--steps` steps of the model alone (no communication), of DDP
and of Paceline in turn; its ratios compare the medians, so that a load that comes and goes on the machine
hits all. The result is the median of the rounds' ratios; `alone / DDP` is what communication that costs
nothing would reach. With another fabric than torch, DDP keeps Gloo.

`prepare` makes malloc keep what a step frees, which spares every step its page faults. In one process that
helps all sides, so the ratios show communication only; with `--apart` each has what its own users get.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

SIDES = ("alone", "ddp", "paceline")


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
    sides = {}
    for name in arguments.sides:
        model = build(arguments.width)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        if name == "ddp":
            model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=arguments.bucket_view)
        elif name == "paceline":
            model, optimizer = job.prepare(model, optimizer, strategy=arguments.strategy)
        sides[name] = (model, optimizer)
    rounds = {batch: measure(sides, batch, arguments, job.barrier) for batch in arguments.batch}
    if job.is_main:
        Path(arguments.rounds_to).write_text(json.dumps(rounds))
    job.barrier()
    job.close()


def measure(
    sides: dict[str, tuple[nn.Module, torch.optim.Optimizer]],
    batch: int,
    arguments: argparse.Namespace,
    barrier: Callable[[], None],
) -> list[dict[str, float]]:
    """Median step seconds of each side, by round."""
    for model, optimizer in sides.values():
        step_times_s(model, optimizer, batch, 3, barrier)
    return [
        {
            name: statistics.median(step_times_s(model, optimizer, batch, arguments.steps, barrier))
            for name, (model, optimizer) in sides.items()
        }
        for _ in range(arguments.rounds)
    ]


def report(arguments: argparse.Namespace, batch: int, rounds: list[dict[str, float]]) -> dict[str, object]:
    """Print one batch size's figures, and return them."""
    parameters = sum(p.numel() for p in build(arguments.width).parameters())
    ratios = [r["paceline"] / r["ddp"] for r in rounds]
    floor = statistics.median(r["alone"] / r["ddp"] for r in rounds)
    steps = {name: statistics.median(r[name] for r in rounds) for name in SIDES}
    print(
        f"{arguments.ranks} ranks, {parameters / 1e6:.1f} M parameters, {batch} samples a rank: "
        + ", ".join(f"{name} {step_s * 1e3:.0f} ms" for name, step_s in steps.items())
    )
    print("  ratios of the rounds:", ", ".join(f"{ratio:.3f}" for ratio in ratios))
    print(
        f"  {arguments.strategy} / DDP, median step time ratio: {statistics.median(ratios):.3f}"
        f" (alone / DDP: {floor:.3f})",
        flush=True,
    )
    return {
        "benchmark": "training_step",
        "ranks": arguments.ranks,
        "parameters": parameters,
        "batch_per_rank": batch,
        "steps_per_side": arguments.steps,
        "strategy": arguments.strategy,
        "ddp_bucket_view": arguments.bucket_view,
        "fabric": arguments.fabric or "torch",
        "apart": arguments.apart,
        "torch": torch.__version__,
        **{f"{name}_step_s": step_s for name, step_s in steps.items()},
        "median_ratio": statistics.median(ratios),
        "alone_ratio": floor,
        "rounds": rounds,
    }


def launch(arguments: argparse.Namespace, folder: str, extra: list[str]) -> dict[str, list[dict[str, float]]]:
    """Run one job; the rounds of its sides, by batch size."""
    path = Path(folder, "rounds.json")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={arguments.ranks}", *sys.argv, *extra, "--rounds-to", str(path)]
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    rounds: dict[str, list[dict[str, float]]] = json.loads(path.read_text())
    return rounds


def run(arguments: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """All rounds, by batch size: in one job, or each side of each round in a job of its own."""
    with tempfile.TemporaryDirectory() as folder:
        if not arguments.apart:
            return launch(arguments, folder, [])
        rounds: dict[str, list[dict[str, float]]] = {}
        for _ in range(arguments.rounds):
            one: dict[str, dict[str, float]] = {}
            for side in SIDES:
                job = launch(arguments, folder, ["--sides", side, "--rounds", "1"])
                for batch, (times,) in job.items():
                    one.setdefault(batch, {}).update(times)
            for batch, times in one.items():
                rounds.setdefault(batch, []).append(times)
        return rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--width", type=int, default=2048, help="2048 gives 25 M parameters")
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 32, 64], help="samples per rank")
    parser.add_argument("--steps", type=int, default=8, help="steps of each side in a round")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--bucket-view", action="store_true", help="DDP with gradient_as_bucket_view=True")
    parser.add_argument("--strategy", default="all_reduce")
    parser.add_argument("--fabric", default=None, help="torch or native; default: the package's")
    parser.add_argument("--apart", action="store_true", help="each side in processes of its own")
    parser.add_argument("--json", help="write the full result here")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--rounds-to", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        worker(arguments)
        return
    results = [report(arguments, int(batch), rounds) for batch, rounds in run(arguments).items()]
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
