"""Runs the checks of a module on P ranks that share one process group: starting ranks is what costs time."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from types import ModuleType
from typing import Any

import pytest

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "paceline.comm.process_group.group"])


def join(rank: int, size: int, path: str, backend: str, network: bool, timeout_s: float) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    torch.manual_seed(0)
    if network:  # every rank pretends to be a host of its own
        from paceline.comm.process_group import connect

        connect.host_identity = lambda: f"host{rank}"
        connect.own_address = lambda store: "127.0.0.1"
    dist.init_process_group(
        backend,
        init_method=f"file://{path}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout_s),
    )


def _main(
    body: Callable[..., Any],
    rank: int,
    size: int,
    path: str,
    backend: str,
    network: bool,
    timeout_s: float,
    pipe: Any,
    rest: Any,
) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    try:
        join(rank, size, path, backend, network, timeout_s)
        import torch.distributed as dist

        value = body(rank, size, *rest)
        if dist.is_initialized():
            dist.destroy_process_group()
        pipe.send((True, value))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
        pipe.close()
        os._exit(1)


def run(
    size: int,
    body: Callable[..., Any],
    *rest: Any,
    backend: str = "paceline",
    network: bool = False,
    timeout_s: float = 60.0,
    limit_s: float = 150.0,
    may_die: tuple[int, ...] = (),
) -> list[Any]:
    """Result of `body(rank, size, *rest)` of every rank; None for those that may die and did."""
    with tempfile.TemporaryDirectory() as folder:
        processes, pipes = [], []
        for rank in range(size):
            ours, theirs = CONTEXT.Pipe(duplex=False)
            path = os.path.join(folder, "store")
            arguments = (body, rank, size, path, backend, network, timeout_s, theirs, rest)
            process = CONTEXT.Process(target=_main, args=arguments)
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        results: list[Any] = []
        try:
            for rank, pipe in enumerate(pipes):
                if not pipe.poll(limit_s):
                    results.append((False, f"rank {rank} of {size} hangs"))
                    break
                try:
                    results.append(pipe.recv())
                except EOFError:
                    results.append((rank in may_die, None if rank in may_die else "died"))
        finally:
            for process in processes:
                process.join(10 if len(results) == size else 0.1)
                if process.is_alive():
                    process.kill()
                    process.join()
    wrong = [f"rank {r}: {text}" for r, (ok, text) in enumerate(results) if not ok]
    assert not wrong, "\n".join(wrong)
    codes = [p.exitcode for r, p in enumerate(processes) if r not in may_die]
    assert codes == [0] * len(codes), f"exit codes {codes}"
    return [value for _, value in results]


def checks(module: str | ModuleType) -> list[str]:
    """Names of the module's functions `check_*`, in order."""
    module = sys.modules[module] if isinstance(module, str) else module
    return [name for name in vars(module) if name.startswith("check_")]


def run_checks(rank: int, size: int, module: str) -> dict[str, str]:
    """Call every check of `module`; name -> traceback of those that failed."""
    import importlib

    import torch.distributed as dist

    loaded = importlib.import_module(module)
    failed = {}
    for name in checks(loaded):
        try:
            getattr(loaded, name)(rank, size)
        except (Exception, pytest.fail.Exception):
            failed[name] = f"rank {rank}: {traceback.format_exc()}"
        dist.barrier()
    return failed


def outcome(size: int, module: str, **named: Any) -> dict[str, str]:
    """Run all checks of `module` on `size` ranks; name -> tracebacks."""
    merged: dict[str, str] = {}
    for failed in run(size, run_checks, module, **named):
        for name, text in failed.items():
            merged[name] = merged.get(name, "") + text
    return merged
