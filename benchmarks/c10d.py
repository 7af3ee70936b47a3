"""torch.distributed over paceline beside gloo: every collective by size, and DDP training steps.

    python benchmarks/c10d.py collectives [--ranks 2] [--json FILE] [--only all_reduce …]
    python benchmarks/c10d.py steps [--ranks 2] [--json FILE]

Both backends live in the same processes and take turns in blocks of back-to-back calls; figures are medians
over blocks of the slowest rank, the ratio is the median of the ratios of neighbouring blocks.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable

SIZES = (4, 1 << 10, 32 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20)
OPERATIONS = ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "all_to_all", "all_gather_list")


def call(name: str, num_bytes: int, group, size: int) -> Callable[[], object]:
    import torch
    import torch.distributed as dist

    n = max(num_bytes // 4 // size, 1) * size  # elements of the whole
    whole, share = torch.ones(n), torch.ones(n // size)
    other = torch.empty(n)
    parts = [torch.empty(n // size) for _ in range(size)]
    return {
        "all_reduce": lambda: dist.all_reduce(whole, group=group),
        "reduce_scatter": lambda: dist.reduce_scatter_single(share, whole, group=group),
        "all_gather": lambda: dist.all_gather_single(whole, share, group=group),
        "broadcast": lambda: dist.broadcast(whole, src=0, group=group),
        "all_to_all": lambda: dist.all_to_all_single(other, whole, group=group),
        "all_gather_list": lambda: dist.all_gather(parts, share, group=group),
    }[name]


def repetitions(num_bytes: int) -> int:
    return max(3, min(400, (8 << 20) // max(num_bytes, 1)))


def collectives(rank: int, size: int, groups, chosen) -> list[dict]:
    import torch
    import torch.distributed as dist

    rows = []
    for name in chosen.only or OPERATIONS:
        for num_bytes in chosen.sizes or SIZES:
            calls = {b: call(name, num_bytes, g, size) for b, g in groups.items()}
            times: dict[str, list[float]] = {b: [] for b in groups}
            for block in range(chosen.blocks + 1):
                for backend, f in calls.items():
                    count = repetitions(num_bytes)
                    dist.barrier()
                    start = time.perf_counter()
                    for _ in range(count):
                        f()
                    seconds = torch.tensor([(time.perf_counter() - start) / count])
                    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
                    if block:  # the first warms up
                        times[backend].append(seconds.item())
            rows.append(row(name, num_bytes, times))
            if rank == 0:
                print(line(rows[-1]), flush=True)
    return rows


def row(name: str, num_bytes: int, times: dict[str, list[float]]) -> dict:
    ratios = [a / b for a, b in zip(times["gloo"], times["paceline"], strict=True)]
    return {
        "name": name,
        "bytes": num_bytes,
        **{f"{b}_s": statistics.median(t) for b, t in times.items()},
        "ratio": statistics.median(ratios),
    }


def line(r: dict) -> str:
    unit, scale = ("ms", 1e3) if r["gloo_s"] > 2e-3 else ("µs", 1e6)
    times = f"gloo {r['gloo_s'] * scale:9.1f} {unit}  paceline {r['paceline_s'] * scale:9.1f} {unit}"
    return f"{r['name']:16} {r['bytes']:>10}  {times}  {r['ratio']:6.2f} x"


def models():
    import torch
    from torch import nn

    def mlp(width: int, depth: int):
        layers = [nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(depth)]
        return nn.Sequential(*layers, nn.Linear(width, 10))

    def cnn():
        return nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(32 * 8 * 8, 10),
        )  # fmt: skip

    def transformer():
        layer = nn.TransformerEncoderLayer(128, 4, 256, dropout=0.0, batch_first=True)
        return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(128, 10))

    def residual():
        class Block(nn.Module):
            def __init__(self, width: int):
                super().__init__()
                conv = [nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2)]
                self.f = nn.Sequential(
                    conv[0], nn.BatchNorm2d(width), nn.ReLU(), conv[1], nn.BatchNorm2d(width)
                )

            def forward(self, x):
                return torch.relu(x + self.f(x))

        ends = nn.Conv2d(3, 32, 3, padding=1), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return nn.Sequential(ends[0], *(Block(32) for _ in range(4)), ends[1], nn.Linear(32, 10))

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(64, 128, 2, batch_first=True), nn.Linear(128, 10)

        def forward(self, x):
            return self.head(self.lstm(x)[0][:, -1])

    def embedding():
        return nn.Sequential(
            nn.Embedding(20_000, 64), nn.Flatten(), nn.Linear(64 * 16, 64), nn.Linear(64, 10)
        )

    yield "25 M-parameter MLP", mlp(2048, 6), torch.randn(32, 2048)
    yield "small MLP", mlp(64, 2), torch.randn(32, 64)
    yield "CNN", cnn(), torch.randn(16, 3, 32, 32)
    yield "small transformer", transformer(), torch.randn(4, 32, 128)
    yield "residual CNN", residual(), torch.randn(8, 3, 32, 32)
    yield "LSTM", Recurrent(), torch.randn(16, 24, 64)
    yield "embedding", embedding(), torch.randint(20_000, (32, 16))


def steps(rank: int, size: int, groups, chosen) -> list[dict]:
    import copy

    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    rows = []
    torch.manual_seed(0)
    for name, model, x in models():
        if chosen.models and not any(name.startswith(m) for m in chosen.models):
            continue
        nets = {b: DistributedDataParallel(copy.deepcopy(model), process_group=g) for b, g in groups.items()}
        optimizers = {b: torch.optim.SGD(net.parameters(), lr=1e-3) for b, net in nets.items()}
        count = 3 if name.startswith("25") else 20
        times: dict[str, list[float]] = {b: [] for b in groups}
        for block in range(chosen.blocks + 1):
            for backend, net in nets.items():
                dist.barrier()
                start = time.perf_counter()
                for _ in range(count):
                    optimizers[backend].zero_grad()
                    net(x).square().mean().backward()
                    optimizers[backend].step()
                seconds = torch.tensor([(time.perf_counter() - start) / count])
                dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
                if block:
                    times[backend].append(seconds.item())
        rows.append(row(name, sum(p.numel() for p in model.parameters()) * 4, times))
        if rank == 0:
            print(line(rows[-1]), flush=True)
    return rows


def main_of_rank(rank: int, size: int, path: str, chosen) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("paceline", init_method=f"file://{path}", rank=rank, world_size=size)
    groups = {"gloo": dist.new_group(backend="gloo"), "paceline": dist.group.WORLD}
    rows = {"collectives": collectives, "steps": steps}[chosen.what](rank, size, groups, chosen)
    if rank == 0 and chosen.json:
        with open(chosen.json, "w") as file:
            json.dump({"ranks": size, "rows": rows}, file, indent=1)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["collectives", "steps"])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--only", nargs="*", choices=OPERATIONS)
    parser.add_argument("--models", nargs="*", help="of steps: those whose name begins so")
    parser.add_argument("--sizes", nargs="*", type=int, help="bytes of the whole tensor")
    parser.add_argument("--json")
    chosen = parser.parse_args()
    os.environ.update(GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1")
    # Fresh gradients would otherwise be fresh pages in every step.
    os.environ.update(MALLOC_MMAP_THRESHOLD_="1073741824", MALLOC_TRIM_THRESHOLD_="2147483648")
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "store")
        ranks = [
            context.Process(target=main_of_rank, args=(r, chosen.ranks, path, chosen))
            for r in range(chosen.ranks)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()


if __name__ == "__main__":
    main()
