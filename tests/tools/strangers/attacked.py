"""A rank of a job that strangers attack: it tells what the job listens on, and how fast it goes meanwhile.

    paceline run -n 2 tests/tools/strangers/attacked.py RESULT.json native --seconds 8 --mark TOKEN

Rank 0 writes the result. What the script itself finds open before the job begins, such as Ray's own ports in
Ray's worker processes, is not the job's. The launcher's listeners are found by an environment variable.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # torch's client tells its failures at length
import torch
import torch.distributed as dist

from strangers.listeners import Listener, is_private, reachable_keys, tcp_listeners

MARK = "PACELINE_ATTACKED"
"""A variable in the environment of the launcher; its value tells one such job from others."""
FLOATS = 250_000


def messages_and_collectives() -> tuple[Callable[[], None], Callable[[Any], list[Any]]]:
    """One step of a job on the native fabric, and how its ranks exchange plain values."""
    import paceline
    from paceline.types import Message

    job = paceline.init()
    job.comm.serve("echo", lambda source, message: message)
    job.comm.barrier().wait()
    x, peer = torch.ones(FLOATS), (job.rank + 1) % job.size

    def step() -> None:
        job.comm.all_reduce(x).wait()
        x.fill_(1)
        job.comm.call(peer, "echo", Message({"n": 1})).wait(60)

    return step, job.gather_objects


def process_group(backend: str) -> tuple[Callable[[], None], Callable[[Any], list[Any]]]:
    """The same over a process group of torch.distributed."""
    dist.init_process_group(backend)
    x = torch.ones(FLOATS)

    def step() -> None:
        dist.all_reduce(x)
        x.fill_(1)

    def gather(value: Any) -> list[Any]:
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        return values

    return step, gather


def marked_python(token: str) -> set[int]:
    """The Python processes of the launcher: those with the mark, ranks and other programs left out."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_marked = f"{MARK}={token}".encode() in (folder / "environ").read_bytes().split(b"\0")
            program = os.path.basename(os.readlink(folder / "exe"))
            words = (folder / "cmdline").read_bytes().split(b"\0")
            is_rank = any(word.endswith(Path(__file__).name.encode()) for word in words[1:3])
            if is_marked and program.startswith("python") and not is_rank:
                found.add(int(folder.name))
    return found


def attack(listeners: list[Listener], seconds: float, *, on_itself: bool = False) -> subprocess.Popen[bytes]:
    """A process of another account, if this one may start such, that floods them one after the other.

    Or, as a control, as many listeners of its own: what it takes from this machine's cores is not the job's.
    """
    places = ["own" if on_itself else f"{x.address}:{x.port}" for x in listeners]
    tool = str(Path(__file__).with_name("listeners.py"))
    return subprocess.Popen([sys.executable, tool, "flood", str(seconds), *places])


def steps_until(step: Callable[[], None], gather: Callable[[Any], list[Any]], is_over: Any) -> list[float]:
    """Durations of steps, in seconds, until rank 0 says that it is over."""
    durations: list[float] = []
    while True:
        for _ in range(20):
            began = time.monotonic()
            step()
            durations.append(time.monotonic() - began)
        if gather(is_over())[0]:
            return durations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("how", choices=("native", "paceline", "gloo"), help="fabric or backend")
    parser.add_argument("--seconds", type=float, default=8.0, help="without strangers, and with them")
    parser.add_argument("--mark", default="", help=f"the value of {MARK}")
    options = parser.parse_args()
    own = {os.getpid()}
    before = set(tcp_listeners(own))
    step, gather = messages_and_collectives() if options.how == "native" else process_group(options.how)
    for _ in range(50):
        step()
    mine = [list(x) for x in set(tcp_listeners(own)) - before]
    ranks = [Listener(*x) for rank in gather(mine) for x in rank]
    is_main = gather(os.getpid())[0] == os.getpid()
    launcher = tcp_listeners(marked_python(options.mark)) if is_main and options.mark else []
    found = sorted({(x.address, x.port): x for x in [*ranks, *launcher]}.values())
    end = time.monotonic() + options.seconds
    quiet = steps_until(step, gather, lambda: time.monotonic() > end)
    during = []
    for on_itself in (True, False):
        attacker = attack(found, options.seconds, on_itself=on_itself) if is_main else None
        during.append(steps_until(step, gather, lambda a=attacker: a is None or a.poll() is not None))
    control, flooded = during
    if is_main:
        result = {
            "ranks": len(ranks),
            "launcher": len(launcher),
            "reachable_from_other_hosts": sum(not is_private(x) for x in found),
            "keys": reachable_keys(found),
            "quiet": 1 / statistics.fmean(quiet),
            "control": 1 / statistics.fmean(control),
            "flooded": 1 / statistics.fmean(flooded),
        }
        options.result.write_text(json.dumps(result))
    gather("done")
    print("went on to the end", flush=True)


if __name__ == "__main__":
    main()
