"""P worker processes on one GPU, started once: each holds a native communicator, and what it opens for CUDA.

A body is a module-level function `body(job, *arguments)`; the same body trains models on the CPU and on the
GPU, which is how their results are compared.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from paceline.comm.fabric import for_device
from paceline.comm.native import shared_memory
from paceline.comm.rendezvous.meeting import Meeting
from paceline.train.job import Job

LIMIT_S = 45


class GpuPool:
    """`run` returns the results of all ranks in order, or raises AssertionError with their tracebacks."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._folder = tempfile.TemporaryDirectory()
        self._start()

    def run(self, body: Callable[..., Any], *arguments: Any, **keywords: Any) -> list[Any]:
        if not all(process.is_alive() for process in self._processes):
            self.close()
            self._start()
        for pipe in self._pipes:
            pipe.send((body, arguments, keywords))
        results, failures = [], []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(LIMIT_S if not failures else 5):
                failures.append(f"rank {rank} hangs in {body.__name__}")
                continue
            try:
                is_ok, value = pipe.recv()
            except EOFError:
                is_ok, value = False, f"rank {rank} died in {body.__name__}"
            (results if is_ok else failures).append(value)
        if failures:
            self.close()  # a failed operation leaves communicators unusable: the next body gets new ranks
            raise AssertionError("\n".join(failures))
        return results

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join(10)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        store = tempfile.mktemp(dir=self._folder.name)
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.size, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)


def _serve(rank: int, size: int, store_path: str, pipe: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    store = dist.PrefixStore("job", dist.FileStore(str(Path(store_path)), size))
    meeting = Meeting(
        rank, size, rank, size, "test", ("here",) * size, ("",) * size, store, b"sixteen secret bytes"
    )
    native = shared_memory.connect(meeting, timeout_s=60)
    comms = {}
    if torch.cuda.is_available():
        device = torch.device("cuda", 0)
        comms[device] = for_device(native, device)
    while True:
        try:
            body, arguments, keywords = pipe.recv()
        except EOFError:
            return
        try:
            torch.manual_seed(100 + rank)
            job = Job(native, seed=5)
            job._comms.update(comms)
            pipe.send((True, body(job, *arguments, **keywords)))
        except BaseException:
            pipe.send((False, f"rank {rank}:\n{traceback.format_exc()}"))
