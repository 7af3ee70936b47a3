"""all_reduce of CUDA tensors among ranks that share a GPU: Gloo, and staging over the native fabric by hand.

Staging: copy to memory that the native fabric reaches best, all_reduce there, copy back. One step follows the
other, nothing overlaps: what a pipeline should beat.
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

from paceline.train.job import Job

SIZES = [4 << 10, 1 << 20, 16 << 20, 64 << 20]


def body(job: Job, num_bytes: int, rounds: int) -> dict[str, float]:
    """Median milliseconds of both ways, alternating."""
    device = torch.device("cuda", 0)
    gloo, native = job._comms[device], job.comm
    tensor = torch.randn(num_bytes // 4, device=device)
    host = native.allocate(num_bytes // 4, torch.float32)

    def by_gloo() -> None:
        gloo.all_reduce(tensor).wait()

    def by_staging() -> None:
        host.copy_(tensor)
        native.all_reduce(host).wait()
        tensor.copy_(host)

    times: dict[str, list[float]] = {"gloo": [], "staging": []}
    for turn in range(rounds + 1):
        for name, call in (("gloo", by_gloo), ("staging", by_staging)):
            tensor.normal_()
            torch.cuda.synchronize()
            native.barrier().wait()
            start = time.perf_counter()
            call()
            torch.cuda.synchronize()
            if turn:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(found) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print(f"{'all_reduce, float32 on one GPU':36}{'Gloo ms':>10}{'staged ms':>11}{'ratio':>8}")
    for size in (2, 4):
        pool = GpuPool(size)
        for num_bytes in SIZES:
            results = pool.run(body, num_bytes, options.rounds)
            slowest = {way: max(r[way] for r in results) for way in results[0]}
            ratio = slowest["gloo"] / slowest["staging"]
            rows.append({"ranks": size, "bytes": num_bytes, **slowest, "ratio": ratio})
            name = f"{size} ranks, {num_bytes >> 10} KiB"
            print(f"{name:36}{slowest['gloo']:10.2f}{slowest['staging']:11.2f}{ratio:8.1f}", flush=True)
        pool.close()
    if options.json:
        options.json.write_text(json.dumps({"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
