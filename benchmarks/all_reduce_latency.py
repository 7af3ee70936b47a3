"""all_reduce beside gloo: blocks of calls, alternating libraries, maximum over ranks, median of blocks.

python benchmarks/all_reduce_latency.py --ranks 2 [--network]
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch._C._distributed_c10d import FileStore

from paceline.comm.native.shared_memory import connect
from paceline.comm.rendezvous.meeting import Meeting

SIZES = [4, 1 << 10, 32 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20]


def timed(call, barrier, reps):
    barrier()
    start = time.perf_counter()
    for _ in range(reps):
        call()
    return (time.perf_counter() - start) / reps


def rank_main(rank, size, path, network, blocks):
    torch.set_num_threads(1)
    hosts = tuple(f"h{r}" if network else "h" for r in range(size))
    addresses = ("127.0.0.1" if network else "",) * size
    meeting = Meeting(rank, size, rank, size, "bench", hosts, addresses, FileStore(path, size), b"secret")
    comm = connect(meeting, timeout_s=60)
    dist.init_process_group("gloo", store=FileStore(path + "g", size), rank=rank, world_size=size)
    for num_bytes in SIZES:
        private, allocated = torch.zeros(num_bytes // 4), comm.allocate(num_bytes // 4, torch.float32)
        calls = {
            "gloo": lambda t=private: dist.all_reduce(t),
            "private": lambda t=private: comm.all_reduce(t).wait(),
            "allocated": lambda t=allocated: comm.all_reduce(t).wait(),
        }
        if num_bytes <= 32 << 10:
            tensors = [torch.zeros(num_bytes // 4) for _ in range(8)]
            calls["8 in flight"] = lambda t=tensors: [w.wait() for w in [comm.all_reduce(x) for x in t]]
        times = {name: [] for name in calls}
        for _ in range(blocks):
            for name, call in calls.items():
                reps = max(2, min(500 if name != "gloo" else 100, (16 << 20) // num_bytes))
                took = torch.tensor([timed(call, lambda: comm.barrier().wait(), reps)], dtype=torch.float64)
                dist.all_reduce(took, op=dist.ReduceOp.MAX)
                times[name].append(float(took))
        if rank == 0:
            median = {n: sorted(t)[len(t) // 2] * 1e6 for n, t in times.items()}
            print(
                f"{num_bytes:>10} B " + "  ".join(f"{n} {v:10.1f} us" for n, v in median.items()), flush=True
            )
    dist.destroy_process_group()
    comm.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--network", action="store_true")
    options = parser.parse_args()
    path = os.path.join(tempfile.mkdtemp(), "store")
    mp.spawn(rank_main, (options.ranks, path, options.network, options.blocks), nprocs=options.ranks)


if __name__ == "__main__":
    main()
