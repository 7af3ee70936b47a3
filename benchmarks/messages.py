"""Messages between two processes of one host: through shared memory against through the socket alone.

    python benchmarks/messages.py

A call that carries a tensor and is answered without one, as a push to a parameter server; microseconds,
medians over alternating blocks of both kinds in one run. 64 KiB are below what goes through shared memory:
both sides are the socket there, which shows the noise.
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

import torch

import paceline
from paceline.comm.messages.shared_blocks import LEAST_BYTES
from paceline.types import Message

SIZES = (1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24)


def worker(blocks: int = 7, calls: int = 10) -> dict[int, dict[str, float]]:
    job = paceline.init()
    comm: Any = job.comm
    comm.serve("sink", lambda src, message: None)
    spent: dict[tuple[int, bool], list[float]] = {}
    for block in range(2 * blocks):
        is_shared = block % 2 == 0
        comm._mailbox()._least_shared_bytes = LEAST_BYTES if is_shared else 1 << 60
        comm.barrier().wait()
        for num_bytes in SIZES if comm.rank == 0 else ():
            tensor = torch.zeros(num_bytes // 4)
            for _ in range(calls):
                begin = time.perf_counter()
                comm.call(1, "sink", Message({}, [tensor])).wait()
                spent.setdefault((num_bytes, is_shared), []).append(time.perf_counter() - begin)
    comm.barrier().wait()
    job.close()
    return {n: _row(spent[n, False], spent[n, True]) for n in SIZES} if spent else {}


def _row(socket_s: list[float], shared_s: list[float]) -> dict[str, float]:
    socket_us, shared_us = (1e6 * statistics.median(s) for s in (socket_s, shared_s))
    rounded = {"socket_us": round(socket_us), "shared_us": round(shared_us)}
    return {**rounded, "socket_over_shared": round(socket_us / shared_us, 2)}


if __name__ == "__main__":
    for size, row in paceline.launch(worker, num_workers=2, progress=False, threads=1)[0].items():
        print(size, json.dumps(row))
