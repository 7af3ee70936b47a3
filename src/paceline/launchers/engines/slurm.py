"""Workers under Slurm: a batch script whose `srun` starts them; ranks come from srun's environment.

Inside an allocation (salloc, or a batch script of your own) `srun` is called directly. Otherwise the script
is given to `sbatch`, its output is followed, and the job is cancelled when this launcher is told to stop.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

from paceline.errors import ConfigError
from paceline.launchers.batch_script import batch_script, output_file, srun_command, worker_variables
from paceline.launchers.job import JobSpec
from paceline.launchers.processes.child_process import ChildProcess, TaggedLines
from paceline.launchers.processes.console import Console
from paceline.launchers.processes.outcome import Outcome
from paceline.launchers.runner import Runner

_LABEL = rb"\s*(\d+): ?"  # srun --label
_FOLLOW_S = 0.3
_WRITTEN_FROM_JOB = (
    "job-name",
    "nodes",
    "ntasks-per-node",
    "cpus-per-task",
    "gpus-per-task",
    "mem",
    "open-mode",
    "wait",
)


class SlurmRunner(Runner):
    """Asks Slurm for hosts and lets srun start the workers.

    Args:
        partition: Engine option: the partition in which to queue. Any other long option of sbatch may be
            given in the same way; an empty value gives the option without one (`-o exclusive=`).
        account: Engine option: the account that is charged.
        time: Engine option: the time limit, e.g. 04:00:00. With a checkpoint, the job is queued again when it
            reaches the limit.
        output: Engine option: the file for the output; default NAME-%j.out, %j being the job's number.
        setup: Engine option: a shell command before the workers start, e.g. `module load gcc`.

    Example:
        paceline run --on slurm --nodes 4 -n 8 -o partition=cpu -o time=04:00:00 train.py
    """

    options: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "partition": "the partition in which to queue",
            "account": "the account that is charged",
            "time": "the limit, e.g. 04:00:00; with a checkpoint the job is queued again when it is reached",
            "output": "the file for the output (default: NAME-%j.out)",
            "setup": "a shell command before the workers start, such as `module load gcc`",
            "*": "any other long option of sbatch",
        }
    )

    def check(self, job: JobSpec) -> None:
        """Refuse options that the batch script sets itself, and secrets, which would be readable in it."""
        super().check(job)
        for name in job.engine_options:
            if name in _WRITTEN_FROM_JOB:
                raise ConfigError(
                    f"engine slurm: {name}= is written from -n, --nodes, --resources and --name; leave it out"
                )
        if job.secret_file is not None:
            raise ConfigError(
                "engine slurm: workers read PACELINE_SECRET_FILE, else ~/.config/paceline/key, on their"
                " hosts, because others can read the batch script; leave out --secret-file"
            )

    def preview(self, job: JobSpec) -> str:
        return batch_script(job)

    def run(self, job: JobSpec, *, console: Console) -> Outcome:
        """Submit the job and follow its output, or call srun inside an allocation."""
        if "SLURM_JOB_ID" in os.environ and shutil.which("srun"):
            return _run_step(job, console)
        if shutil.which("sbatch") is None:
            raise ConfigError(
                "engine slurm: there is neither an allocation (SLURM_JOB_ID) nor the program sbatch on this"
                " host; run this on a login node of the cluster, or print the script with --dry-run and"
                " submit it there"
            )
        with tempfile.TemporaryDirectory(prefix="paceline-slurm-") as folder:
            path = Path(folder) / "job.sh"
            path.write_text(batch_script(job))
            return _submit(job, path, console)


def _run_step(job: JobSpec, console: Console) -> Outcome:
    """Start the workers in the allocation that this process is part of."""
    srun = ChildProcess(console)
    outcome = srun.run_to_end(
        [*srun_command(job), *job.command],
        environment={**os.environ, **worker_variables(job)},
        directory=job.working_directory,
        splitters=(TaggedLines(_LABEL), TaggedLines(_LABEL)),
        grace_s=job.stop_grace_s,
    )
    for line in srun.messages if outcome.exit_code else ():
        console.note(line)
    return outcome


def _submit(job: JobSpec, path: Path, console: Console) -> Outcome:
    sbatch = ChildProcess(console)
    with _following(sbatch, (job.working_directory or Path()) / output_file(job), console):
        outcome = sbatch.run_to_end(
            ["sbatch", "--parsable", "--wait", str(path)],
            environment=os.environ,
            directory=job.working_directory,
            splitters=(TaggedLines(_LABEL), TaggedLines(_LABEL)),
            grace_s=job.stop_grace_s,
            stop_command=lambda: _cancel_command(sbatch),
        )
    for line in sbatch.messages[1:] if outcome.exit_code and outcome.signal is None else ():
        console.note(line)
    return outcome


def _job_number(sbatch: ChildProcess) -> str | None:
    """The job's number once sbatch has printed it (`123` or `123;cluster`)."""
    first = sbatch.messages[0].split(";")[0].strip() if sbatch.messages else ""
    return first if first.isdigit() else None


def _cancel_command(sbatch: ChildProcess) -> list[str]:
    number = _job_number(sbatch)
    return ["scancel"] if number is None else ["scancel", number]


@contextlib.contextmanager
def _following(sbatch: ChildProcess, output: Path, console: Console) -> Iterator[None]:
    """Show the job's output file as it grows, if this host sees it."""
    has_ended = threading.Event()
    reader = threading.Thread(target=_follow, args=(sbatch, output, console, has_ended), daemon=True)
    reader.start()
    try:
        yield
    finally:
        has_ended.set()
        reader.join(10)


def _follow(sbatch: ChildProcess, output: Path, console: Console, has_ended: threading.Event) -> None:
    while (number := _job_number(sbatch)) is None and not has_ended.is_set():
        time.sleep(_FOLLOW_S)
    if number is None:
        return
    path, lines, position = Path(str(output).replace("%j", number)), TaggedLines(_LABEL), 0
    console.note(f"Slurm job {number}; its output goes to {path}")
    is_last = False
    while not is_last:
        is_last = has_ended.is_set()  # read once more after the end
        with contextlib.suppress(OSError), path.open("rb") as file:
            file.seek(position)
            data = file.read()
            position += len(data)
            for rank, text in lines.feed(data):
                shown = text.decode("utf-8", "replace").rstrip("\n")
                console.note(shown) if rank is None else console.line(rank, shown)
        if not is_last:
            has_ended.wait(_FOLLOW_S)
