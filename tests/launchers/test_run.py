"""`paceline run` as a user sees it: a real launcher, real workers, real signals."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("processes")

PACELINE = (sys.executable, "-m", "paceline.cli.main")
# A child, and a grandchild that leaves the session: both must end with the job.
SLEEPER = """
import os, signal, subprocess, sys, time
subprocess.Popen(["sleep", sys.argv[1]])
subprocess.Popen(["setsid", "sleep", sys.argv[1]])
print("ready", flush=True)
time.sleep(300)
"""


def write(folder: Path, text: str) -> str:
    path = folder / "script.py"
    path.write_text(text)
    return str(path)


def run(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run(
        [*PACELINE, "run", *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=90,
        cwd=cwd,
        env=env,
    )


def processes_with(argument: str) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit() and argument.encode() in (folder / "cmdline").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def assert_gone(argument: str, within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while left := processes_with(argument):
        assert time.monotonic() < deadline, f"processes {left} are still there"
        time.sleep(0.05)


@contextlib.contextmanager
def started(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A running launcher; killed, with its guard following, if the test does not end it."""
    with subprocess.Popen(
        [*PACELINE, "run", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(process: subprocess.Popen[str], word: str, times: int) -> None:
    assert process.stdout is not None
    while times:
        line = process.stdout.readline()
        assert line, f"the output ended before {word!r}"
        times -= word in line


def test_every_line_has_its_rank_and_lines_stay_whole(tmp_path: Path) -> None:
    script = write(
        tmp_path,
        "import os, sys\n"
        "for i in range(200):\n"
        "    for part in ('line', ' ', str(i), '\\n'):\n"
        "        sys.stdout.write(part); sys.stdout.flush()\n"
        "print('args', sys.argv[1:], os.environ['WORLD_SIZE'], file=sys.stderr)\n"
        "sys.stdout.write('no newline at the end')\n",
    )
    done = run("-n", "3", script, "--lr", "0.1", "-n", "9")
    assert done.returncode == 0, done.stderr
    for rank in range(3):
        own = [line for line in done.stdout.splitlines() if line.startswith(f"[{rank}] ")]
        assert own == [*(f"[{rank}] line {i}" for i in range(200)), f"[{rank}] no newline at the end"]
        assert f"[{rank}] args ['--lr', '0.1', '-n', '9'] 3" in done.stderr
    assert len(done.stdout.splitlines()) == 603
    assert "\x1b" not in done.stdout + done.stderr, "colours belong on a terminal only"


def test_failing_worker_comes_last_with_its_rank_and_exit_code(tmp_path: Path) -> None:
    script = write(
        tmp_path,
        "import torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "if dist.get_rank() == 1:\n"
        "    raise ValueError('boom from one')\n"
        "print('waiting', flush=True)\n"
        "dist.all_reduce(torch.ones(1))\n",
    )
    done = run("-n", "3", script)
    lines = done.stderr.splitlines()
    assert done.returncode == 1
    assert lines[-1] == "[1] ValueError: boom from one"
    head = max(i for i, line in enumerate(lines) if line.startswith("paceline: "))
    assert "rank 1 of 3" in lines[head]
    assert lines[head + 1] == "[1] Traceback (most recent call last):"
    assert done.stderr.count("boom from one") == 2  # the source line and the message: shown once
    assert "torch.distributed.elastic" not in done.stderr


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("sys.exit(7)", 7, "rank 1 of 2 (host"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "was killed by SIGKILL"),
        ("import ctypes; ctypes.string_at(0)", 139, "ended by SIGSEGV"),
    ],
)
def test_exit_code_is_the_workers(tmp_path: Path, body: str, code: int, said: str) -> None:
    script = write(
        tmp_path, f"import os, signal, sys, time\nif os.environ['RANK'] == '1': {body}\ntime.sleep(300)\n"
    )
    done = run("-n", "2", script)
    assert done.returncode == code
    assert said in done.stderr
    assert "rank 1 of 2" in done.stderr.splitlines()[-1] or "[1] " in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_no_process_is_left(tmp_path: Path, number: signal.Signals, code: int) -> None:
    mark = f"3{os.getpid()}.{int(number)}"
    with started("-n", "2", write(tmp_path, SLEEPER), mark) as launcher:
        wait_for(launcher, "ready", 2)
        assert len(processes_with(mark)) >= 4
        launcher.send_signal(number)
        assert launcher.wait(30) == code
    assert_gone(mark)


def test_grandchildren_end_with_a_successful_job(tmp_path: Path) -> None:
    mark = f"4{os.getpid()}"
    script = write(tmp_path, SLEEPER.replace("time.sleep(300)", ""))
    assert run("-n", "2", script, mark).returncode == 0
    assert_gone(mark)


def test_workers_get_sigterm_and_time_to_save(tmp_path: Path) -> None:
    script = write(
        tmp_path,
        "import pathlib, signal, sys, time\n"
        "def save(*_):\n"
        "    time.sleep(0.5); print('saved', flush=True); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "print('ready', flush=True)\n"
        "while True: time.sleep(0.1)\n",
    )
    with started("-n", "2", script) as launcher:
        wait_for(launcher, "ready", 2)
        launcher.send_signal(signal.SIGTERM)
        wait_for(launcher, "saved", 2)
        assert launcher.wait(30) == 143


def test_second_interrupt_does_not_wait(tmp_path: Path) -> None:
    script = write(
        tmp_path,
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('ready', flush=True)\ntime.sleep(300)\n",
    )
    with started("-n", "1", "--grace", "200", script) as launcher:
        wait_for(launcher, "ready", 1)
        launcher.send_signal(signal.SIGINT)
        time.sleep(0.5)
        launcher.send_signal(signal.SIGINT)
        assert launcher.wait(30) == 130


def test_restarts_as_often_as_asked(tmp_path: Path) -> None:
    script = write(
        tmp_path,
        "import os, sys\ncount = os.environ['TORCHELASTIC_RESTART_COUNT']\nprint('try', count)\n"
        "if count != '1' and os.environ['RANK'] == '1': sys.exit(5)\n",
    )
    done = run("-n", "2", "--max-restarts", "1", script)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n")[:-1])[-1] == "[1] try 1"
    assert "restarting" in done.stderr


def test_worker_environment(tmp_path: Path) -> None:
    script = write(
        tmp_path,
        "import os\nfrom paceline.options import JobOptions\n"
        "o = JobOptions.from_environment(os.environ)\n"
        "print(len(o.secret), o.fabric, o.checkpoint, o.progress, os.environ['OMP_NUM_THREADS'])\n",
    )
    done = run(
        *("-n", "2", "--fabric", "torch", "--checkpoint", "c", "--no-progress", "--threads", "3", script)
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["[0] 64 torch c False 3", "[1] 64 torch c False 3"]


def test_modules_run_with_m(tmp_path: Path) -> None:
    (tmp_path / "trainer.py").write_text("import sys; print('module', sys.argv[1:])")
    done = run("-n", "1", "-m", "trainer", "x", cwd=tmp_path)
    assert done.stdout == "[0] module ['x']\n", done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["missing.py"], "'missing.py' does not exist"),
        (["-n", "0", __file__], "at least 1 expected, got 0"),
        (["-m", "no.such.module"], "no module named 'no.such.module'"),
        (["--strategy", "al_reduce", __file__], "Known: "),
        (["--strategy", "local_sgd(period=", __file__], "cannot read"),
        (["--fabric", "carrier_pigeon", __file__], "native or torch expected"),
        (["--nodes", "2", __file__], "--rendezvous HOST:PORT"),
        (["--nodes", "2", "--rendezvous", "host:99999", __file__], "port from 1 to 65535"),
        (["--threads", "0", __file__], "at least 1 expected"),
        (["--max-restarts", "-1", __file__], "at least 0 expected"),
        (["--secret-file", "/nonexistent", __file__], "cannot be read"),
    ],
)
def test_bad_input_is_refused_before_any_work(arguments: list[str], said: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_secret_file_must_be_private(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("0123456789abcdef")
    path.chmod(0o644)
    assert "others can read it" in run("--secret-file", str(path), __file__).stderr
    path.chmod(0o600)
    path.write_text("short")
    assert "at least 16 characters" in run("--secret-file", str(path), __file__).stderr
