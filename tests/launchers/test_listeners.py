"""What a job listens on, and what strangers can do there: nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from strangers.listeners import annoy, is_private, processes_below, tcp_listeners

pytestmark = pytest.mark.xdist_group("processes")

PACELINE = (sys.executable, "-m", "paceline.cli.main")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
# Collectives and messages go on until the file appears; then every rank says how often.
SCRIPT = """
import pathlib, sys, time
import torch, torch.distributed as dist
import paceline
from paceline.types import Message
stop, how = pathlib.Path(sys.argv[1]), sys.argv[2]
def run(comm):
    comm.serve("echo", lambda source, message: message)
    comm.barrier().wait()
    x, count, peer = torch.ones(1000), 0, (comm.rank + 1) % comm.size
    print("ready", flush=True)
    over = torch.zeros(1)
    while not over.item():
        comm.all_reduce(x).wait()
        x.fill_(1)
        assert comm.call(peer, "echo", Message({"n": count})).wait(60).header["n"] == count
        count += 1
        over.fill_(float(stop.exists()))
        comm.all_reduce(over).wait()
    comm.barrier().wait()
def group():
    dist.init_process_group(how)
    x, over = torch.ones(1000), torch.zeros(1)
    print("ready", flush=True)
    while not over.item():
        dist.all_reduce(x)
        x.fill_(1)
        over.fill_(float(stop.exists()))
        dist.all_reduce(over)
    dist.destroy_process_group()
if how in ("gloo", "paceline"):
    group()
else:
    job = paceline.init(fabric=how)
    run(job.comm)
    job.close()
print("went on to the end", flush=True)
"""


class RunningJob:
    """A job that trains until it is told to stop."""

    def __init__(self, folder: Path, command: tuple[str, ...], how: str) -> None:
        self._stop = folder / "stop"
        script = folder / "script.py"
        script.write_text(SCRIPT)
        self._output = folder / "output"
        with self._output.open("w") as output:
            self._process = subprocess.Popen(
                [*command, str(script), str(self._stop), how],
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_until_ready(self, num_ranks: int) -> None:
        deadline = time.monotonic() + 90
        while self.output.count("ready") < num_ranks:
            assert time.monotonic() < deadline and self._process.poll() is None, self.output
            time.sleep(0.05)

    @property
    def output(self) -> str:
        return self._output.read_text()

    @property
    def pid(self) -> int:
        return self._process.pid

    def end(self) -> str:
        self._stop.touch()
        assert self._process.wait(60) == 0, self.output
        return self.output

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(20)


@pytest.fixture
def jobs() -> Iterator[list[RunningJob]]:
    started: list[RunningJob] = []
    yield started
    for job in started:
        job.kill()


@pytest.mark.parametrize("how", ["native", "torch", "gloo", "paceline"])
def test_a_job_of_one_host_listens_on_loopback_only(how: str, tmp_path: Path, jobs: list[RunningJob]) -> None:
    jobs.append(RunningJob(tmp_path, (*PACELINE, "run", "-n", "2"), how))
    jobs[0].wait_until_ready(2)
    found = tcp_listeners(processes_below(jobs[0].pid))
    assert all(is_private(listener) for listener in found), found
    if how in ("native", "paceline"):  # messages of the native fabric; nothing for the rendezvous
        assert len({listener.port for listener in found}) <= 2
    assert "went on to the end" in jobs[0].end()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another account")
def test_another_account_cannot_reach_the_store(tmp_path: Path, jobs: list[RunningJob]) -> None:
    jobs.append(RunningJob(tmp_path, (*PACELINE, "run", "-n", "2"), "native"))
    jobs[0].wait_until_ready(2)
    paths = {line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines() if "store-" in line}
    assert paths
    reached = []
    child = os.fork()
    if child == 0:
        os.setgid(65534)
        os.setuid(65534)
        for path in paths:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
                sock.connect(path)
                reached.append(path)
        os._exit(len(reached))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    jobs[0].end()


@pytest.mark.parametrize(
    ("command", "how"),
    [
        ((*PACELINE, "run", "-n", "2"), "native"),
        ((*PACELINE, "run", "-n", "2"), "paceline"),
        ((*TORCHRUN, "--standalone", "--nproc-per-node", "2"), "paceline"),
    ],
    ids=["native", "backend", "torchrun"],
)
def test_a_thousand_strangers_stop_nothing(
    command: tuple[str, ...], how: str, tmp_path: Path, jobs: list[RunningJob]
) -> None:
    """torchrun's own port is left out: it is torch's, and believes what it is told."""
    jobs.append(RunningJob(tmp_path, command, how))
    jobs[0].wait_until_ready(2)
    workers = processes_below(jobs[0].pid) - {jobs[0].pid}
    kept: list[socket.socket] = []
    for listener in {(x.address, x.port): x for x in tcp_listeners(workers)}.values():
        for number in range(1000):
            annoy(listener.address, listener.port, kept, number)
    output = jobs[0].end()
    assert output.count("went on to the end") == 2
    assert len(output.splitlines()) < 60  # what is said about strangers is bounded
    for sock in kept:
        sock.close()


def test_hosts_with_different_keys_are_refused_at_once(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    launchers = []
    for host in ("a", "b"):
        home = tmp_path / host
        home.mkdir()
        command = [*PACELINE, "run", "--nodes", "2", "--rendezvous", endpoint, "-n", "1"]
        command += ["-m", "this"]
        environment = {**os.environ, "HOME": str(home)}
        environment.pop("XDG_CONFIG_HOME", None)
        launchers.append(
            subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
        deadline = time.monotonic() + 60
        while host == "a" and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", int(endpoint.split(":")[1])), timeout=1).close()
                break
            time.sleep(0.1)
    text, _ = launchers[1].communicate(timeout=60)
    launchers[0].terminate()
    launchers[0].communicate(timeout=30)
    assert launchers[1].returncode != 0
    assert "has another key than this host. Copy ~/.config/paceline/key" in text
