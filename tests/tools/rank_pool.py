"""P worker processes that are started once and run many test bodies: starting torch costs seconds.

They hold communicators of both fabrics; `--fabric` (tests/conftest.py) says which the bodies get.
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
from torch._C._distributed_c10d import PrefixStore

from paceline import core
from paceline.comm.communicator import FabricCommunicator
from paceline.comm.rendezvous.meeting import Meeting
from paceline.comm.torch_fabric import TorchCommunicator
from paceline.train.job import Job


class RankPool:
    """Ranks that can talk over either fabric. A body is a module-level function `body(job, *arguments)`.

    `hosts`: by one letter for each rank, as "aab", for the native fabric; by default all are on one.
    """

    def __init__(self, size: int, fabric: str = "native", *, hosts: str = "") -> None:
        self.fabric = fabric
        self.size = size
        self._folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            arguments = (rank, size, hosts or "h" * size, str(Path(self._folder.name) / "store"), theirs)
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
            pipe.send((body, ranks, self.fabric, arguments, keywords))
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


def _serve(rank: int, size: int, native_hosts: str, store_path: str, pipe: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store_path, size), rank=rank, world_size=size)
    hosts = ("here",) * size
    store = PrefixStore("native", dist.distributed_c10d._get_default_store())
    addresses = ("127.0.0.1" if len(set(native_hosts)) > 1 else "",) * size
    meeting = Meeting(
        rank, size, rank, size, "test", tuple(native_hosts), addresses, store, b"the secret of the tests"
    )
    worlds: list[FabricCommunicator] = [TorchCommunicator(hosts)]
    if not core.missing:
        from paceline.comm.native import shared_memory

        worlds.append(shared_memory.connect(meeting, timeout_s=60))
    parts = {(w.fabric, n): w.split(list(range(n))) for w in worlds for n in range(1, size + 1)}
    while True:
        try:
            body, ranks, fabric, arguments, keywords = pipe.recv()
        except EOFError:
            return
        try:
            torch.manual_seed(100 + rank)
            comm = parts[fabric, ranks]
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
