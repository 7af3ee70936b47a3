"""Jobs of each launcher that run `attacked.py`, each on this host alone."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import fake_slurm
from netlab import Lab

from strangers.attacked import MARK

SCRIPT = str(Path(__file__).with_name("attacked.py"))
RUN = (sys.executable, "-m", "paceline.cli.main", "run")
ONE_HOST = ("run", "backend", "ray", "spark", "mpi", "torchrun")
"""Jobs whose listeners other hosts must not reach; the others are several hosts to Paceline."""
KINDS = (*ONE_HOST, "nodes", "slurm", "hosts", "torchrun, Gloo")


def commands(kind: str, *, mpirun: str = "mpirun", lab: Lab | None = None) -> list[tuple[str, ...]]:
    """What starts the job, without the script's own arguments; several hosts have a launcher each."""
    if kind in ("nodes", "hosts"):
        endpoint = f"{lab.address(0)}:29400" if lab is not None else f"127.0.0.1:{free_port()}"
        return [(*RUN, "--nodes", "2", "--rendezvous", endpoint, "-n", "1", SCRIPT)] * 2
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    words = {
        "run": (*RUN, "-n", "2"),
        "backend": (*RUN, "-n", "2"),
        "ray": (*RUN, "--on", "ray", "-o", "address=local", "-n", "2"),
        "spark": (*RUN, "--on", "spark", "-o", "master=local[2]", "-n", "2"),
        "mpi": (*RUN, "--on", "mpi", "-o", f"mpirun={mpirun}", "-n", "2"),
        "slurm": (*RUN, "--on", "slurm", "--nodes", "2", "-n", "1"),
        "torchrun": torchrun,
        "torchrun, Gloo": torchrun,
    }
    return [(*words[kind], SCRIPT)]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def attacked(kind: str, folder: Path, *, seconds: float = 8.0, mpirun: str = "mpirun") -> dict[str, Any]:
    """Run such a job to its end, and return what its rank 0 tells; AssertionError if it fails.

    Args:
        kind: One of KINDS; `hosts` are network namespaces, which only root can make.
        folder: An empty one, where the job writes.
        seconds: How long it runs before strangers come, and while they come.
        mpirun: The program, for `mpi`.
    """
    token, result = secrets.token_hex(8), folder / "result.json"
    how = {"torchrun, Gloo": "gloo", "backend": "paceline", "torchrun": "paceline"}.get(kind, "native")
    environment = {**os.environ, MARK: token, "OMP_NUM_THREADS": "1", "RES_OPTIONS": "timeout:1 attempts:1"}
    if kind == "slurm":
        environment = {k: v for k, v in environment.items() if not k.startswith("SLURM_")}
        environment["PATH"] = fake_slurm.install(folder)
    own = [str(result), how, "--seconds", str(seconds)]
    # torchrun's own store is torch's, and believes what it is told; drivers of Ray and Spark have ports of
    # theirs, and Spark's server for accumulators waits for ever for who says nothing.
    if kind not in ("ray", "spark", "torchrun", "torchrun, Gloo"):
        own += ["--mark", token]
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(Lab(hosts=2)) if kind == "hosts" else None
        output = stack.enter_context((folder / "output").open("w"))
        started = []
        for host, words in enumerate(commands(kind, mpirun=mpirun, lab=lab)):
            start = subprocess.Popen if lab is None else functools.partial(lab.popen, host)
            process = start(
                [*words, *own],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=folder,
                start_new_session=True,
            )
            started.append(process)
            stack.callback(_end, process)
        codes = [process.wait(180) for process in started]
    text = (folder / "output").read_text()
    assert codes == [0] * len(started) and text.count("went on to the end") == 2, text
    return {**json.loads(result.read_text()), "lines": len(text.splitlines())}


def _end(process: subprocess.Popen[Any]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
