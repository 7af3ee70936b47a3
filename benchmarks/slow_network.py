"""Seconds to 97 % on four hosts with 100 Mbit/s: DDP over Gloo, DDP + PowerSGD hook, and Paceline.

    python benchmarks/slow_network.py time METHOD [--rate 100mbit]    seconds a step over 20 steps, shaped
    python benchmarks/slow_network.py steps METHOD --seeds 0 1 2      steps to 97 %, the same run unshaped
    python benchmarks/slow_network.py steps METHOD --together         the same in one process
    python benchmarks/slow_network.py steps METHOD --shaped           both at once: `train_s` to 97 %
    python benchmarks/slow_network.py check METHOD                    that the two give the same weights
    METHOD: ddp, ddp_powersgd(rank=1), or any Paceline strategy, e.g. "decentralized_threshold(density=1e-3)"

A 14.6-million-parameter MLP (784, 3444, 3444, 10) on MNIST, SGD with lr 0.04 and momentum 0.9, 64 samples a
worker, one thread a worker, one worker a host; hosts are network namespaces (root, Linux;
tests/tools/netlab) with tbf at each port. Each prints JSON; seconds to 97 % = `step_s` of the first x `steps`
of the second.

`--together` does the four workers' arithmetic in one process: for DDP one worker with all samples of a step,
which is the same because gradients are means (PowerSGD's factors and errors are linear in the gradient, so
its hook too sees what the mean of four would be); for Paceline's methods four workers of the simulated
fabric. `check` runs 6 steps both ways and prints how far apart the weights end, relative to how far they
went; asynchronous methods differ there, because messages arrive at other times.

Timed: 20 steps after the warm-up, up to when all messages have arrived. PyTorch's PowerSGD hook sends whole
gradients for its first two steps (the least it allows): they are left out of its time. Accuracy is that of
the replicas as workers hold them, each on its quarter of the 10,000 test images, every 16 steps.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from paceline import simulate, spec
from paceline.comm import current

HERE = Path(__file__).resolve()
SHARED = Path(os.environ.get("PACELINE_SHARED", HERE.parents[2] / "shared"))
WIDTH, WORKERS = 3444, 4


def mlp() -> nn.Sequential:
    """14.6 million parameters, He's initial weights."""
    layers = [nn.Linear(784, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10)]
    for layer in layers[::2]:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)
    nn.init.zeros_(layers[-1].weight)
    return nn.Sequential(*layers)


class Peer:
    """One method behind one face: a model to step, and its own way to finish."""

    def __init__(self, method: str) -> None:
        parsed = spec.parse(method)
        self.model: Any = mlp()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.04, momentum=0.9)
        self.job: Any = None
        if not parsed.name.startswith("ddp"):
            import paceline

            self.job = paceline.init() if current.provided() else paceline.init(fabric="torch")
            self.model, self.optimizer = self.job.prepare(self.model, self.optimizer, strategy=method)
            return
        dist.init_process_group("gloo")
        # The PowerSGD hook starts a bucket's later sums from callbacks, in an order that differs between
        # ranks: over Gloo more than one bucket aborts. So it gets one bucket.
        cap_mb = 64 if parsed.name == "ddp_powersgd" else None
        self.model = nn.parallel.DistributedDataParallel(self.model, bucket_cap_mb=cap_mb)
        if parsed.name == "ddp_powersgd":
            from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

            rank = int(parsed.arguments.get("rank", 1))
            state = powerSGD_hook.PowerSGDState(None, rank, start_powerSGD_iter=2)
            self.model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)

    def step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        nn.functional.cross_entropy(self.model(x), y).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def drained(self) -> None:
        """All that was sent has arrived everywhere."""
        if self.job is None:
            dist.barrier()
        else:
            self.job.comm.drain()

    def total(self, value: torch.Tensor) -> torch.Tensor:
        if self.job is None:
            dist.all_reduce(value)
        else:
            self.job.comm.all_reduce(value).wait()
        return value

    def close(self) -> None:
        if self.job is None:
            dist.destroy_process_group()
        else:
            self.job.close()


class Data:
    """MNIST, normalized, and the minibatches that the workers draw."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as file:
            self.images, self.tests = (
                (torch.from_numpy(file[k]).float().view(-1, 784) / 255 - 0.1307) / 0.3081
                for k in ("x_train", "x_test")
            )
            self.labels, self.answers = (torch.from_numpy(file[k]).long() for k in ("y_train", "y_test"))

    def batches(
        self, workers: list[int], *, batch: int, seed: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        generators = [torch.Generator().manual_seed(1000 * seed + r) for r in workers]
        while True:
            own = [torch.randint(0, len(self.labels), (batch,), generator=g) for g in generators]
            chosen = torch.cat(own)
            yield self.images[chosen], self.labels[chosen]


def work(options: argparse.Namespace) -> None:
    """One worker, or all of them together; rank 0 prints the result."""
    signal.alarm(options.limit_s)  # nothing outlives the run
    torch.set_num_threads(1)
    data = Data(options.data)
    if not options.together:
        result = one_worker(options, data, [int(os.environ["RANK"])])
    elif options.method.startswith("ddp"):
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1"}
        result = one_worker(options, data, list(range(WORKERS)))
    else:
        body = partial(one_worker, options, data)
        result = simulate(lambda rank: body([rank]), num_workers=WORKERS, record=False)[0]
    if options.together or os.environ["RANK"] == "0":
        print(json.dumps(result), flush=True)


def one_worker(options: argparse.Namespace, data: Data, workers: list[int]) -> dict[str, Any]:
    """Train with the samples of `workers`."""
    torch.manual_seed(options.seed)
    peer = Peer(options.method)
    batches = data.batches(workers, batch=options.batch, seed=options.seed)
    result: dict[str, Any] = {"method": options.method, "seed": options.seed, "batch": options.batch}
    if options.what == "time":
        result |= timed(peer, batches, options)
    elif options.what == "check":
        result["weights"] = checked(peer, batches, options)
    else:
        mine = slice(None) if len(workers) == WORKERS else slice(workers[0], None, WORKERS)
        result |= until_accurate(peer, batches, data.tests[mine], data.answers[mine], options)
    if peer.job is not None:
        result["stats"] = peer.job.stats().get("codec")
    peer.drained()
    peer.close()
    return result


def timed(peer: Peer, batches: Any, options: argparse.Namespace) -> dict[str, Any]:
    for _ in range(options.warm):
        peer.step(*next(batches))
    peer.drained()
    begin = time.perf_counter()
    for _ in range(options.steps):
        peer.step(*next(batches))
    peer.drained()
    return {"step_s": (time.perf_counter() - begin) / options.steps, "steps": options.steps}


def checked(peer: Peer, batches: Any, options: argparse.Namespace) -> list[list[float]]:
    """After 6 steps: every 99,991st weight, and how far it has gone."""
    first = flat(peer)
    for _ in range(6):
        peer.step(*next(batches))
    peer.drained()
    return [flat(peer).tolist(), (flat(peer) - first).tolist()]


def flat(peer: Peer) -> torch.Tensor:
    module = getattr(peer.model, "module", peer.model)
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])[::99_991].clone()


def until_accurate(peer: Peer, batches: Any, tests: Any, answers: Any, options: Any) -> dict[str, Any]:
    curve: list[tuple[int, float]] = []
    train_s, begin = 0.0, time.perf_counter()
    for step in range(1, options.most + 1):
        peer.step(*next(batches))
        if step >= 96 and step % 16 == 0:
            peer.drained()
            train_s += time.perf_counter() - begin
            accuracy = share_right(peer, tests[:500], answers[:500])
            if accuracy > options.target - 0.02:  # the first images came close: now all of them
                accuracy = share_right(peer, tests, answers)
                curve.append((step, accuracy))
                if accuracy >= options.target:
                    return {"steps": step, "accuracy": accuracy, "train_s": train_s, "curve": curve}
            begin = time.perf_counter()
    return {"steps": None, "train_s": train_s, "curve": curve}


def share_right(peer: Peer, tests: torch.Tensor, answers: torch.Tensor) -> float:
    with torch.no_grad():
        module = getattr(peer.model, "module", peer.model)
        pairs = zip(tests.split(500), answers.split(500), strict=True)
        right = sum(int((module(x).argmax(1) == y).sum()) for x, y in pairs)
    counts = peer.total(torch.tensor([float(right), float(len(answers))], dtype=torch.float64))
    return float(counts[0] / counts[1])


def run(options: argparse.Namespace, *, together: bool) -> list[dict[str, Any]]:
    """Start a worker per host, or one for all; one run per seed."""
    sys.path.insert(0, str(HERE.parents[1] / "tests" / "tools"))
    from netlab import Lab

    results = []
    size = 1 if together else WORKERS
    is_shaped = options.shaped or options.what == "time"
    with Lab(hosts=size, rate=options.rate if is_shaped else None) as lab:
        for seed in options.seeds:
            argv = [sys.executable, str(HERE), *sys.argv[1:], "--worker", "--seed", str(seed)]
            argv += ["--together"] if together else []
            env = {
                "WORLD_SIZE": str(WORKERS),
                "MASTER_ADDR": lab.address(0),
                "MASTER_PORT": str(29500 + seed),
            }
            env |= {"GLOO_SOCKET_IFNAME": "eth0", "RES_OPTIONS": "timeout:1 attempts:1"}
            # Fresh gradients of 25 MB would otherwise fault in every page in every step.
            env |= {"MALLOC_MMAP_THRESHOLD_": "2000000000", "MALLOC_TRIM_THRESHOLD_": "2000000000"}
            workers = [
                lab.popen(
                    r, argv, env={**env, "RANK": str(r), "LOCAL_RANK": "0"}, stdout=subprocess.PIPE, text=True
                )
                for r in range(size)
            ]
            told = [w.communicate(timeout=options.limit_s + 30)[0] for w in workers]
            results.append(json.loads(told[0].strip().splitlines()[-1]))
    return results


def compare_both_ways(options: argparse.Namespace) -> None:
    """Largest difference of a weight, over the largest distance that a weight went."""
    apart, together = (
        torch.tensor(run(options, together=t)[0]["weights"], dtype=torch.float64) for t in (False, True)
    )
    difference = float((apart[0] - together[0]).abs().max() / apart[1].abs().max())
    print(f"{options.method}: weights of {WORKERS} processes and of one differ by {difference:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["time", "steps", "check"])
    parser.add_argument("method")
    parser.add_argument("--together", action="store_true", help="steps: all workers in one process")
    parser.add_argument("--shaped", action="store_true", help="steps: on the shaped network, for `train_s`")
    parser.add_argument("--rate", default="100mbit")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warm", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64, help="per worker")
    parser.add_argument("--target", type=float, default=0.97)
    parser.add_argument("--most", type=int, default=1500, help="give up after this many steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--limit-s", type=int, default=1800)
    parser.add_argument("--data", type=Path, default=SHARED / "data" / "mnist.npz")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.together and options.what != "steps" and not options.worker:
        parser.error(f"--together is for steps: {options.what} starts the processes it needs")
    if options.worker:
        work(options)
        return
    if options.what == "check":
        compare_both_ways(options)
        return
    results = run(options, together=options.together)
    print(*map(json.dumps, results), sep="\n")
    found = [r["steps"] for r in results if r["steps"] is not None]
    if options.what == "steps" and found:
        print(f"{options.method}: median {statistics.median(found)} steps to {options.target:.0%} of {found}")


if __name__ == "__main__":
    main()
