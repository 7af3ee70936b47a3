"""P worker processes that are started once and run many test bodies: starting torch costs seconds."""

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

from paceline.comm.torch import TorchCommunicator
from paceline.train.job import Job


class RankPool:
    """Ranks of one Gloo group. A body is a module-level function (job, *arguments) -> plain values."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            arguments = (rank, size, str(Path(self._folder.name) / "store"), theirs)
            process = context.Process(target=_serve, args=arguments)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(
        self, body: Callable[..., Any], *arguments: Any, ranks: int | None = None, **keywords: Any
    ) -> list[Any]:
        """Results of the first `ranks` ranks (all by default), or AssertionError with their tracebacks."""
        ranks = ranks or self.size
        for pipe in self._pipes[:ranks]:
            pipe.send((body, ranks, arguments, keywords))
        results, failures = [], []
        for rank, pipe in enumerate(self._pipes[:ranks]):
            if not pipe.poll(180 if not failures else 5):
                self.close()
                raise AssertionError(f"rank {rank} hangs in {body.__name__}; failures so far: {failures}")
            is_ok, value = pipe.recv()
            (results if is_ok else failures).append(value)
        assert not failures, "\n".join(failures)
        return results

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join(10)
        self._folder.cleanup()


def _serve(rank: int, size: int, store_path: str, pipe: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store_path, size), rank=rank, world_size=size)
    world = TorchCommunicator(["here"] * size)
    parts = {n: world.split(list(range(n))) for n in range(1, size + 1)}
    while True:
        try:
            body, ranks, arguments, keywords = pipe.recv()
        except EOFError:
            return
        try:
            torch.manual_seed(100 + rank)
            comm = parts[ranks]
            assert comm is not None
            job = Job(comm, seed=5)
            pipe.send((True, body(job, *arguments, **keywords)))
        except BaseException:
            pipe.send((False, f"rank {rank}:\n{traceback.format_exc()}"))


def alone(job: Job) -> Job:
    """A job of one rank inside a worker: the reference that several ranks are compared with."""
    comm = job.comm.split([job.rank])
    assert comm is not None
    return Job(comm, seed=5)
