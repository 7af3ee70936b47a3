"""`paceline run --on slurm`: the script, and the whole path with programs that stand in for Slurm's."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_slurm
import pytest

from paceline.errors import ConfigError
from paceline.launchers.job import JobSpec, Resources
from paceline.launchers.runner import make
from paceline.options import VARIABLE, JobOptions

pytestmark = [pytest.mark.engines, pytest.mark.xdist_group("processes")]

ROOT = Path(__file__).resolve().parents[3]
DIGITS = str(ROOT / "examples" / "digits.py")
PACELINE = (sys.executable, "-m", "paceline.cli.main", "run", "--on", "slurm")


def spec(**changes: object) -> JobSpec:
    return JobSpec(
        **{"command": (sys.executable, "-u", "train.py", "--name", "a b"), "num_workers": 2, **changes}
    )  # type: ignore[arg-type]


def run(path: str, *words: str, cwd: Path, timeout: float = 90) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")} | {"PATH": path}
    return subprocess.run(
        [*PACELINE, *words],
        check=False,
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
        env=environment,
    )


def directives(text: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]
    return dict(line.partition("=")[::2] for line in lines)


def test_the_script_asks_for_what_the_job_needs(tmp_path: Path) -> None:
    job = spec(
        nodes=4,
        name="big",
        resources=Resources(cpus=3, gpus=1, memory_bytes=2 << 30),
        options=JobOptions(strategy="local_sgd(period=8)", checkpoint="/data/it's"),
        environment={"DATA": "two words"},
        working_directory=tmp_path,
        max_restarts=2,
        grace_s=40,
        engine_options={"partition": "gpu", "time": "01:00:00", "setup": "module load gcc", "exclusive": ""},
    )
    text = make("slurm").preview(job)
    assert directives(text) == {
        "job-name": "big",
        "nodes": "4",
        "ntasks-per-node": "2",
        "cpus-per-task": "3",
        "gpus-per-task": "1",
        "mem": "4096M",
        "chdir": str(tmp_path),
        "output": "big-%j.out",
        "open-mode": "append",
        "requeue": "",
        "signal": "TERM@80",
        "partition": "gpu",
        "time": "01:00:00",
        "exclusive": "",
    }
    checked = subprocess.run(
        ["bash", "-n"], check=False, input=text, text=True, capture_output=True, timeout=20
    )
    assert checked.returncode == 0, checked.stderr
    assert "module load gcc" in text and shlex.quote("a b") in text
    # What the shell makes of the quoted variables is what was asked for.
    probe = "\n".join(line for line in text.splitlines() if line.startswith("export "))
    shown = subprocess.run(
        ["bash", "-c", f'{probe}\nprintf \'%s|%s\' "$DATA" "${VARIABLE}"'],
        text=True,
        capture_output=True,
        timeout=20,
        check=True,
    ).stdout
    data, options = shown.split("|", 1)
    assert data == "two words"
    assert JobOptions.from_environment({VARIABLE: options}) == job.options


def test_dry_run_prints_it(tmp_path: Path) -> None:
    done = run(os.environ["PATH"], "--nodes", "4", "--dry-run", DIGITS, "--epochs", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert directives(done.stdout)["nodes"] == "4"
    assert "--nodes=4 --ntasks=4 --ntasks-per-node=1" in done.stdout
    checked = subprocess.run(["bash", "-n"], input=done.stdout, text=True, timeout=20, check=False)
    assert checked.returncode == 0


def test_without_slurm_it_says_so(tmp_path: Path) -> None:
    done = run(os.environ["PATH"], DIGITS, cwd=tmp_path)
    assert done.returncode == 2 and "login node" in done.stderr and "--dry-run" in done.stderr


@pytest.mark.parametrize("name", ["nodes", "mem"])
def test_options_that_would_contradict(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}= is written from"):
        make("slurm").check(spec(engine_options={name: "7"}))


def test_digits_through_sbatch_and_srun(tmp_path: Path) -> None:
    path = fake_slurm.install(tmp_path)
    done = run(path, "--nodes", "2", "-n", "1", DIGITS, "--epochs", "6", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "[0] 2 workers" in done.stdout
    accuracy = next(line for line in done.stdout.splitlines() if "epoch 6" in line).split("accuracy ")[1]
    assert float(accuracy.split(",")[0]) >= 0.95
    assert "Slurm job 4711" in done.stderr


def test_a_failing_rank_ends_the_job_with_its_code(tmp_path: Path) -> None:
    path = fake_slurm.install(tmp_path)
    script = tmp_path / "fail.py"
    script.write_text(
        "import os, sys, time\nif os.environ['SLURM_PROCID'] == '1': sys.exit(7)\ntime.sleep(60)\n"
    )
    began = time.monotonic()
    done = run(path, "-n", "2", str(script), cwd=tmp_path)
    assert done.returncode == 7 and time.monotonic() - began < 50


def test_a_job_that_saved_on_sigterm_is_queued_again(tmp_path: Path) -> None:
    path = fake_slurm.install(tmp_path)
    script = tmp_path / "stops.py"
    script.write_text(
        "import os, sys\nn = os.environ['SLURM_RESTART_COUNT']\nprint('attempt', n)\n"
        "sys.exit(75 if n == '0' else 0)\n"
    )
    done = run(path, "--checkpoint", str(tmp_path / "save"), str(script), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "paceline-4711.out").read_text().count("attempt") == 2


def test_ctrl_c_cancels_the_job(tmp_path: Path) -> None:
    path = fake_slurm.install(tmp_path)
    script = tmp_path / "sleep.py"
    script.write_text("import time\nprint('begun', flush=True)\ntime.sleep(300)\n")
    child = subprocess.Popen(
        [*PACELINE, "-n", "2", str(script)],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        pids = tmp_path / "task.1.pid"
        deadline = time.monotonic() + 60
        while not pids.exists() or not pids.read_text():
            assert time.monotonic() < deadline and child.poll() is None
            time.sleep(0.1)
        task = int(pids.read_text())
        child.send_signal(signal.SIGINT)
        child.communicate(timeout=40)
        assert child.returncode == 130
        deadline = time.monotonic() + 15  # scancel asks; the task may take a moment to die
        while Path(f"/proc/{task}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        child.kill()
        child.communicate()
