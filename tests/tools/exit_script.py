"""Starts and ends interpreters: every exit must be clean, with and without destroy_process_group.

python tests/tools/exit_script.py [--times 100]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "paceline.comm.process_group.group"])


def rank_main(rank: int, path: str, destroy: bool) -> None:
    import torch
    import torch.distributed as dist

    dist.init_process_group("paceline", init_method=f"file://{path}", rank=rank, world_size=2)
    works = [dist.all_reduce(torch.ones(100_000), async_op=True) for _ in range(3)]
    works[0].get_future().then(lambda f: dist.barrier()).wait()
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 8))
    model(torch.ones(2, 8)).sum().backward()
    if destroy:
        dist.destroy_process_group()


def leave(rank: int, path: str, destroy: bool) -> None:
    """The interpreter itself ends, not only the function: a process of its own, started from this one."""
    code = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); import exit_script; "
    code += f"exit_script.rank_main({rank}, {path!r}, {destroy})"
    os.execv(sys.executable, [sys.executable, "-c", code])


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--times", type=int, default=100)
    times = parser.parse_args().times
    bad = 0
    for i in range(times):
        with tempfile.TemporaryDirectory() as folder:
            path, destroy = os.path.join(folder, "store"), bool(i % 2)
            ranks = [CONTEXT.Process(target=leave, args=(r, path, destroy)) for r in range(2)]
            for process in ranks:
                process.start()
            for process in ranks:
                process.join(300)
                if process.exitcode != 0:
                    bad += 1
                    print(f"exit {i} (destroy={destroy}): code {process.exitcode}", flush=True)
                    process.kill()
    print(f"{times - bad} of {times} exits clean")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
