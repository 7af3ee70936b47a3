"""What another account of this host can do to a training job: `paceline run` beside torchrun with Gloo.

    sudo python benchmarks/strangers.py        # root only to become another account; nothing else needs it

For each launcher: which ports the job listens on; whether a process of account `nobody` can read or write
keys at any of them with torch's own TCPStore client; and how the rate of steps changes while it opens 1,000
connections: idle ones, garbage, halves of handshakes, frames that are too long. Nothing harmful is written.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "tools"))

from listeners import Listener, annoy, is_private, processes_below, tcp_listeners  # noqa: E402
from torch.distributed import TCPStore  # noqa: E402  before this process becomes another account

NOBODY = 65534
SECONDS = 8.0
WARM_UP_S = 3.0
NATIVE = """
import time, torch, paceline
job = paceline.init()
x = torch.ones(250_000)
while True:
    job.comm.all_reduce(x).wait()
    x.fill_(1)
    if job.rank == 0:
        print(time.monotonic(), flush=True)
"""
GLOO = """
import time, torch, torch.distributed as dist
dist.init_process_group("gloo")
x = torch.ones(250_000)
while True:
    dist.all_reduce(x)
    x.fill_(1)
    if dist.get_rank() == 0:
        print(time.monotonic(), flush=True)
"""
JOBS = {
    "paceline run": (("-m", "paceline.cli.main", "run", "-n", "2"), NATIVE),
    "torchrun, Gloo": (("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"), GLOO),
}


def rate(output: Path, since: float, until: float) -> float:
    """Steps a second between two times, by the median of their distances."""
    times = []
    for line in output.read_text().splitlines():
        with contextlib.suppress(ValueError, IndexError):
            times.append(float(line.split()[-1]))
    chosen = [t for t in times if since <= t <= until]
    steps = [b - a for a, b in itertools.pairwise(chosen)]
    return 1.0 / statistics.median(steps) if steps else 0.0


def as_nobody(task) -> int:
    """Run `task` in a child that belongs to another account, if this one may do that; its exit code."""
    child = os.fork()
    if child == 0:
        code = 0
        try:
            if os.getuid() == 0:
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            code = int(task())
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def reaches_keys(listeners: list[Listener]) -> int:
    """In how many of the listeners torch's client can write a key, and read it again."""
    count = 0
    for listener in listeners:
        with contextlib.suppress(Exception):
            store = TCPStore(
                "127.0.0.1", listener.port, is_master=False, timeout=datetime.timedelta(seconds=2)
            )
            store.set("stranger", "was here")
            count += store.get("stranger") == b"was here"
    return count


def flood(listeners: list[Listener]) -> int:
    kept: list = []
    for listener in listeners:
        for number in range(1000):
            annoy(listener.address, listener.port, kept, number)
    time.sleep(1)
    return 0


def examine(name: str, command: tuple[str, ...], script: str, folder: Path) -> None:
    path, output = folder / "script.py", folder / "output"
    path.write_text(script)
    with output.open("w") as file:
        job = subprocess.Popen(
            [sys.executable, *command, str(path)],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        while output.read_text().count("\n") < 200:
            if job.poll() is not None:
                raise SystemExit(f"{name} ended: {output.read_text()[-2000:]}")
            time.sleep(0.1)
        found = list({(x.address, x.port): x for x in tcp_listeners(processes_below(job.pid))}.values())
        time.sleep(WARM_UP_S)
        quiet_from = time.monotonic()
        time.sleep(SECONDS)
        quiet_until = time.monotonic()
        as_nobody(lambda: flood(found))
        flooded_until = time.monotonic()
        quiet, flooded = rate(output, quiet_from, quiet_until), rate(output, quiet_until, flooded_until)
        reached = as_nobody(lambda: reaches_keys(found))
        open_to_all = sum(not is_private(x) for x in found)
        print(
            f"{name:16}  TCP ports {len(found)}, reachable from other hosts {open_to_all};"
            f" stores that a stranger reads and writes: {reached};"
            f" steps/s {quiet:.0f}, under 1,000 connections a port {flooded:.0f}"
            f" ({flooded / quiet:.2f} x); still running: {'yes' if job.poll() is None else 'no'}",
            flush=True,
        )
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGTERM)
        job.wait(30)


def main() -> None:
    for name, (command, script) in JOBS.items():
        with tempfile.TemporaryDirectory() as folder:
            examine(name, command, script, Path(folder))


if __name__ == "__main__":
    main()
