"""Runs a function as P processes over the native fabric; a failure or a hang becomes a test failure."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

from torch._C._distributed_c10d import FileStore

from paceline.comm.native.shared_memory import connect
from paceline.comm.rendezvous.meeting import Meeting

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "paceline.comm.native.shared_memory"])


def meeting(rank: int, size: int, path: str, *, network: bool | str = False) -> Meeting:
    """`network`: every rank pretends to be a host of its own; or the hosts by one letter each, as "aab"."""
    store = FileStore(path, size)
    hosts = tuple(network if isinstance(network, str) else (f"h{r}" if network else "h" for r in range(size)))
    addresses = ("127.0.0.1" if network else "",) * size
    return Meeting(rank, size, rank, size, "test", hosts, addresses, store, b"the secret of the tests")


def _main(
    body: Callable[..., Any],
    rank: int,
    size: int,
    path: str,
    network: bool | str,
    timeout_s: float,
    pipe: Any,
    rest: Any,
) -> None:
    import torch

    torch.set_num_threads(1)
    try:
        comm = connect(meeting(rank, size, path, network=network), timeout_s=timeout_s)
        try:
            pipe.send((True, body(comm, *rest)))
        finally:
            comm.close()
    except BaseException:
        pipe.send((False, traceback.format_exc()))


def start(
    size: int, body: Callable[..., Any], *rest: Any, timeout_s: float = 30.0, network: bool | str = False
) -> tuple[list[Any], list[Any]]:
    """Start `body(comm, *rest)` on every rank; returns processes and the pipes with their results."""
    path = os.path.join(tempfile.mkdtemp(), "store")
    processes, pipes = [], []
    for rank in range(size):
        ours, theirs = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(
            target=_main, args=(body, rank, size, path, network, timeout_s, theirs, rest)
        )
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(ours)
    return processes, pipes


def finish(processes: list[Any], timeout_s: float = 10.0) -> None:
    for process in processes:
        process.join(timeout_s)
        if process.is_alive():
            process.kill()
            process.join()


def run(
    size: int,
    body: Callable[..., Any],
    *rest: Any,
    timeout_s: float = 30.0,
    limit_s: float = 90.0,
    network: bool | str = False,
) -> list[Any]:
    """Result of `body(comm, *rest)` of every rank."""
    processes, pipes = start(size, body, *rest, timeout_s=timeout_s, network=network)
    results = []
    try:
        for rank, pipe in enumerate(pipes):
            assert pipe.poll(limit_s), f"rank {rank} of {size} hangs"
            try:
                results.append(pipe.recv())
            except EOFError:
                results.append((False, f"rank {rank} died: exit code {processes[rank].exitcode}"))
    finally:
        if len(results) < size:
            for process in processes:
                process.kill()
        finish(processes)
    wrong = [f"rank {r}: {text}" for r, (ok, text) in enumerate(results) if not ok]
    assert not wrong, "\n".join(wrong)
    return [value for _, value in results]
