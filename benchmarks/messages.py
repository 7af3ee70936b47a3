"""Messages between two processes of one host: through shared memory against through the socket alone.

    python benchmarks/messages.py

A call that carries a tensor and is answered without one, as a push to a parameter server; microseconds,
medians over alternating blocks of both kinds in one run.
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

import torch

import paceline
from paceline.comm.shared_blocks import LEAST_BYTES
from paceline.types import Message

SIZES = (1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24)


def worker(blocks: int = 5, calls: int = 10) -> dict[str, Any]:
    job = paceline.init()
    comm: Any = job.comm
    comm.serve("sink", lambda src, message: None)
    spent: dict[str, list[float]] = {}
    for block in range(2 * blocks):
        is_shared = block % 2 == 0
        comm._mailbox()._least_shared_bytes = LEAST_BYTES if is_shared else 1 << 60
        comm.barrier().wait()
        for num_bytes in SIZES if comm.rank == 0 else ():
            tensor = torch.zeros(num_bytes // 4)
            for _ in range(calls):
                begin = time.perf_counter()
                comm.call(1, "sink", Message({}, [tensor])).wait()
                kind = f"{num_bytes} {'shared' if is_shared else 'socket'}"
                spent.setdefault(kind, []).append(time.perf_counter() - begin)
    comm.barrier().wait()
    job.close()
    return {kind: round(1e6 * statistics.median(seconds)) for kind, seconds in spent.items()}


if __name__ == "__main__":
    print(json.dumps(paceline.launch(worker, num_workers=2, progress=False, threads=1)[0], indent=1))
