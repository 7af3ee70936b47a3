"""One rank of one library in `paceline bench collectives`: connects to the benchmark and does what it says.

Run as a file, also by Python environments that have neither Paceline nor torch: only the library asked for is
imported. Commands and answers are JSON lines over a socket to the benchmark on the same machine.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import time
from collections.abc import Callable
from typing import Any, Protocol

Run = Callable[[], Any]


class Library(Protocol):
    """A library under test; its constructor joins the ranks."""

    name: str
    rank: int
    size: int

    def barrier(self) -> None:
        """Wait for all ranks."""

    def prepare(self, operation: str, num_bytes: int, buffers: str) -> tuple[Run, str]:
        """What to call in the timed loop, and the algorithm that will run."""

    def close(self) -> None:
        """Leave what would otherwise stay behind; the process ends right after."""


class Paceline:
    """The package's own communicator, on the fabric "native" or "tcp" (native without shared memory)."""

    name = "paceline"

    def __init__(self, fabric: str) -> None:
        import dataclasses

        import torch

        from paceline.comm.native import shared_memory
        from paceline.comm.rendezvous.meeting import meet

        torch.set_num_threads(1)
        meeting = meet()
        if fabric == "tcp":
            hosts = tuple(f"rank{r}" for r in range(meeting.size))
            meeting = dataclasses.replace(meeting, hosts=hosts, addresses=("127.0.0.1",) * meeting.size)
        self.comm = shared_memory.connect(meeting, timeout_s=120.0)
        self.fabric, self.rank, self.size = fabric, meeting.rank, meeting.size

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.comm.barrier().wait()

    def prepare(self, operation: str, num_bytes: int, buffers: str) -> tuple[Run, str]:
        """What to call in the timed loop, and the algorithm that will run."""
        import torch

        c, float32 = self.comm, torch.float32
        numel, share = shape(num_bytes, self.size)
        make = c.allocate if buffers == "allocated" else lambda n, dtype: torch.zeros(n, dtype=dtype)
        whole, part = (
            make(numel if operation in IN_PLACE else share * self.size, float32),
            make(share, float32),
        )
        other = make(whole.numel(), float32) if operation in ("all_to_all", "copy") else whole
        root = self.rank == 0
        calls: dict[str, Run] = {
            "all_reduce": lambda: c.all_reduce(whole).wait(),
            "reduce": lambda: c.reduce(whole).wait(),
            "broadcast": lambda: c.broadcast(whole).wait(),
            "all_gather": lambda: c.all_gather(whole, part).wait(),
            "reduce_scatter": lambda: c.reduce_scatter(part, whole).wait(),
            "gather": lambda: c.gather(whole if root else None, part).wait(),
            "scatter": lambda: c.scatter(part, whole if root else None).wait(),
            "all_to_all": lambda: c.all_to_all(other, whole).wait(),
            "barrier": lambda: c.barrier().wait(),
            "copy": lambda: other.copy_(whole),
        }
        algorithm = ""
        if operation != "copy":
            algorithm = self.comm.explain(operation, num_bytes, buffers=buffers).algorithm
        return calls[operation], algorithm

    def close(self) -> None:
        """Release what the library holds."""


class Gloo:
    """torch.distributed with Gloo."""

    name = "gloo"

    def __init__(self, fabric: str) -> None:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        self.dist = dist
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.dist.barrier()

    def prepare(self, operation: str, num_bytes: int, buffers: str) -> tuple[Run, str]:
        """What to call in the timed loop, and the algorithm that will run."""
        import torch

        d = self.dist
        numel, share = shape(num_bytes, self.size)
        whole = torch.zeros(numel if operation in IN_PLACE else share * self.size)
        other, part = torch.zeros_like(whole), torch.zeros(share)
        parts = list(whole.chunk(self.size)) if self.rank == 0 else None
        calls: dict[str, Run] = {
            "all_reduce": lambda: d.all_reduce(whole),
            "reduce": lambda: d.reduce(whole, 0),
            "broadcast": lambda: d.broadcast(whole, 0),
            "all_gather": lambda: d.all_gather_into_tensor(whole, part),
            "reduce_scatter": lambda: d.reduce_scatter_tensor(part, whole),
            "gather": lambda: d.gather(part, parts, 0),
            "scatter": lambda: d.scatter(part, parts, 0),
            "all_to_all": lambda: d.all_to_all_single(other, whole),
            "barrier": d.barrier,
        }
        return calls[operation], "library's own"

    def close(self) -> None:
        """Release what the library holds."""


class MpiLibrary:
    """Whatever MPI the mpi4py of this environment loads."""

    def __init__(self, fabric: str) -> None:
        from mpi4py import MPI

        self.MPI, self.comm = MPI, MPI.COMM_WORLD
        self.rank, self.size = self.comm.Get_rank(), self.comm.Get_size()
        version = MPI.Get_library_version()
        known = {"Open MPI": "openmpi", "Intel": "impi", "MPICH": "mpich"}
        self.name = next((short for long, short in known.items() if long in version), "mpi")

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.comm.Barrier()

    def prepare(self, operation: str, num_bytes: int, buffers: str) -> tuple[Run, str]:
        """What to call in the timed loop, and the algorithm that will run."""
        import numpy as np

        c, in_place = self.comm, self.MPI.IN_PLACE
        numel, share = shape(num_bytes, self.size)
        whole = np.zeros(numel if operation in IN_PLACE else share * self.size, np.float32)
        other, part = np.zeros_like(whole), np.zeros(share, np.float32)
        root = self.rank == 0
        calls: dict[str, Run] = {
            "all_reduce": lambda: c.Allreduce(in_place, whole),
            "reduce": lambda: c.Reduce(in_place if root else whole, whole if root else None),
            "broadcast": lambda: c.Bcast(whole),
            "all_gather": lambda: c.Allgather(part, whole),
            "reduce_scatter": lambda: c.Reduce_scatter_block(whole, part),
            "gather": lambda: c.Gather(part, whole if root else None),
            "scatter": lambda: c.Scatter(whole if root else None, part),
            "all_to_all": lambda: c.Alltoall(whole, other),
            "barrier": c.Barrier,
        }
        return calls[operation], "library's own"

    def close(self) -> None:
        """Finalize: some MPIs leave shared memory otherwise, others complain of an improper end."""
        self.MPI.Finalize()


IN_PLACE = ("all_reduce", "reduce", "broadcast", "copy")
LIBRARIES: dict[str, Callable[[str], Any]] = {"paceline": Paceline, "gloo": Gloo, "mpi": MpiLibrary}


def shape(num_bytes: int, size: int) -> tuple[int, int]:
    """Elements (float32) of the full per-rank buffer, and of one rank's share of it."""
    numel = max(1, num_bytes // 4)
    return numel, max(1, numel // size)


def obey(library: Library, channel: Any) -> None:
    """Answer commands until told to stop or the benchmark is gone."""
    call: Run = library.barrier
    for line in channel:
        command = json.loads(line)
        answer: dict[str, Any] = {}
        if command["do"] == "stop":
            return
        if command["do"] == "prepare":
            call, algorithm = library.prepare(command["operation"], command["num_bytes"], command["buffers"])
            answer["algorithm"] = algorithm
        else:
            library.barrier()
            start = time.perf_counter()
            for _ in range(command["iterations"]):
                call()
            answer["seconds"] = time.perf_counter() - start
        channel.write(json.dumps(answer) + "\n")
        channel.flush()


def main() -> None:
    """Join the benchmark, report that this rank is ready, and run what it is told."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--library", choices=LIBRARIES, required=True)
    parser.add_argument("--fabric", default="")
    parser.add_argument("--socket", required=True)
    options = parser.parse_args()
    token = os.environ["PACELINE_BENCH_TOKEN"]
    library = LIBRARIES[options.library](options.fabric)
    library.barrier()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(options.socket)
        with connection.makefile("rw") as channel:
            hello = {"token": token, "rank": library.rank, "name": library.name}
            channel.write(json.dumps(hello) + "\n")
            channel.flush()
            obey(library, channel)
    library.close()
    os._exit(0)  # whatever a library does at exit is not what is measured


if __name__ == "__main__":
    main()
