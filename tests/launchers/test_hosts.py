"""Several hosts: each runs the launcher, and they meet at one address."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from netlab import Lab, why_not
from strangers import listeners

pytestmark = [
    pytest.mark.net,
    pytest.mark.xdist_group("processes"),
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]

ROOT = Path(__file__).resolve().parents[2]
# A lab has no name server; nobody should wait for one.
ENVIRONMENT = {"RES_OPTIONS": "timeout:1 attempts:1"}


def start(lab: Lab, host: int, *arguments: str, rendezvous: str = "") -> subprocess.Popen[Any]:
    return lab.popen(
        host,
        [
            *(sys.executable, "-m", "paceline.cli.main", "run", "--nodes", "2"),
            *("--rendezvous", rendezvous or f"{lab.address(0)}:29400", *arguments),
        ],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(*processes: subprocess.Popen[Any]) -> list[tuple[int, str, str]]:
    return [(p.wait(240), *p.communicate()) for p in processes]


def test_digits_trained_on_two_hosts() -> None:
    script = str(ROOT / "examples" / "digits.py")
    with Lab(hosts=2) as lab:
        second = start(lab, 1, "-n", "1", script, "--epochs", "8")  # comes first and waits
        first = start(lab, 0, "-n", "1", script, "--epochs", "8")
        results = finish(first, second)
    assert [code for code, *_ in results] == [0, 0], results
    told = results[0][1] + results[1][1]
    assert "2 workers" in told
    last = [line for line in told.splitlines() if "epoch 8: accuracy" in line]
    assert float(last[0].split("accuracy ")[1].split(",")[0]) >= 0.9


def test_one_secret_for_all_hosts_and_failures_told_on_both(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, time, torch, torch.distributed as dist\n"
        "from paceline.options import JobOptions\n"
        "print('secret', JobOptions.from_environment(os.environ).secret, flush=True)\n"
        "dist.init_process_group('gloo')\n"
        "dist.barrier()\n"
        "if dist.get_rank() == 1: raise ValueError('boom')\n"
        "dist.all_reduce(torch.ones(1))\n"
        "time.sleep(300)\n"
    )
    with Lab(hosts=2) as lab:
        results = finish(*(start(lab, host, "-n", "1", str(script)) for host in (0, 1)))
    secrets = {line.split()[-1] for _, out, _ in results for line in out.splitlines() if "secret" in line}
    assert len(secrets) == 1 and len(secrets.pop()) == 64
    assert all(code not in (0, None) for code, *_ in results)
    assert sum("[1] ValueError: boom" in err.splitlines()[-1] for *_, err in results) == 1
    assert all("frame #" not in err for *_, err in results), "no stacks of the C++ store"


@pytest.mark.parametrize("fabric", ["native", "torch"])
def test_hosts_without_ipv4(fabric: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import torch, paceline\n"
        "from paceline.types import Message\n"
        "job = paceline.init(timeout_s=60)\n"
        "both = torch.full((3,), job.rank + 1.0)\n"
        "job.comm.all_reduce(both).wait()\n"
        "job.comm.serve('told', lambda peer, message: message)\n"
        "job.comm.barrier().wait()\n"
        "job.comm.call(1 - job.rank, 'told', Message({}, [both])).wait()\n"
        "job.comm.drain()\n"
        "print('sum', both.tolist(), flush=True)\n"
    )
    with Lab(hosts=2) as lab:
        for host in (0, 1):
            lab.run(host, ["ip", "-4", "addr", "flush", "dev", "eth0"])
        at = f"[{lab.address6(0)}]:29400"
        what = ("--fabric", fabric, str(script))
        results = finish(*(start(lab, host, *what, rendezvous=at) for host in (0, 1)))
    assert [code for code, *_ in results] == [0, 0], results
    assert all("sum [3.0, 3.0, 3.0]" in out for _, out, _ in results), results


def test_secret_file_on_every_host(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os\nfrom paceline.options import JobOptions\n"
        "print('secret', JobOptions.from_environment(os.environ).secret)\n"
    )
    key = tmp_path / "key"
    key.write_text("a shared secret of enough length")
    key.chmod(0o600)
    with Lab(hosts=2) as lab:
        arguments = ("-n", "1", "--secret-file", str(key), str(script))
        results = finish(*(start(lab, host, *arguments) for host in (0, 1)))
    secrets = {line.split()[-1] for _, out, _ in results for line in out.splitlines()}
    assert len(secrets) == 1, results
    assert key.read_text() not in secrets, "workers get a key made of it, not the file's content"


@pytest.mark.slow
def test_a_stranger_on_a_third_host_reaches_nothing(tmp_path: Path) -> None:
    """Every port of both hosts: idle connections, garbage, half handshakes, long frames, torch's client."""
    script, stop = tmp_path / "script.py", tmp_path / "stop"
    script.write_text(
        "import pathlib, sys, torch, paceline\n"
        "from paceline.types import Message\n"
        "job = paceline.init(timeout_s=60)\n"
        "job.comm.serve('echo', lambda source, message: message)\n"
        "job.comm.barrier().wait()\n"
        "over, count = torch.zeros(1), 0\n"
        "while not over.item():\n"
        "    over.fill_(float(pathlib.Path(sys.argv[1]).exists()))\n"
        "    job.comm.all_reduce(over).wait()\n"
        "    assert job.comm.call(1 - job.rank, 'echo', Message({'n': count})).wait().header['n'] == count\n"
        "    count += 1\n"
        "    if count == 100: pathlib.Path(f'{sys.argv[1]}-{job.rank}').touch()\n"
        "job.comm.barrier().wait()\n"
        "print('went on to the end', flush=True)\n"
    )
    tool = str(Path(listeners.__file__))
    with Lab(hosts=3) as lab:
        jobs = [start(lab, host, "-n", "1", str(script), str(stop)) for host in (0, 1)]
        deadline = time.monotonic() + 90
        while not all((tmp_path / f"stop-{r}").exists() for r in (0, 1)):
            assert time.monotonic() < deadline and all(job.poll() is None for job in jobs)
            time.sleep(0.1)
        for host in (0, 1):
            ports = lab.run(host, [sys.executable, tool, "list"]).split()
            assert 2 <= len(ports) <= 4, ports  # the rendezvous on one host, collectives and messages on both
            told = lab.run(2, [sys.executable, tool, "attack", lab.address(host), *ports], timeout_s=120)
            assert told.split() == ["reached", "0"]
        stop.touch()
        results = finish(*jobs)
    assert [code for code, *_ in results] == [0, 0], results
    assert all("went on to the end" in out for _, out, _ in results)


@pytest.mark.slow
def test_the_first_host_tells_of_a_rank_that_was_cut_off_with_its_host(tmp_path: Path) -> None:
    script = str(ROOT / "tests" / "tools" / "faults" / "script.py")
    what = ["--min-workers", "2", script, "cut", "train", "2", "parameter_server", "5.0", str(tmp_path)]
    with Lab(hosts=2) as lab:
        processes = [start(lab, host, "-n", count, *what) for host, count in enumerate("21")]
        until = time.monotonic() + 90
        while not (tmp_path / "fault").exists() and time.monotonic() < until:
            time.sleep(0.02)
        lab.set_link(1, up=False)
        (code, out, err), (other_code, *_) = finish(*processes)
    assert code == 0, err
    assert "rank 0 is through" in out + err and "rank 1 is through" in out + err
    assert "rank 2, of another host, was lost: nothing has come from it for" in err, err
    assert other_code != 0, "the host that was cut off knows that it is not through"
