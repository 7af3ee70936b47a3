"""Workers under Slurm: a batch script whose `srun` starts them; ranks come from srun's environment.

Inside an allocation (salloc, or a batch script of your own) `srun` is called at once; otherwise the script is
handed to `sbatch`, its output followed, and the job cancelled when this launcher is told to stop.
"""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

from paceline.errors import ConfigError
from paceline.launchers.job import JobSpec
from paceline.launchers.processes.child import Program, TaggedLines
from paceline.launchers.processes.console import Console
from paceline.launchers.runner import Engine, Outcome
from paceline.options import JobOptions

_LABEL = rb"\s*(\d+): ?"
_FOLLOW_S = 0.3
_OWN = ("job-name", "nodes", "ntasks-per-node", "cpus-per-task", "gpus-per-task", "mem", "open-mode", "wait")
# After a checkpoint on SIGTERM a worker ends with this code: the job is not over.
_PREEMPTED = 75


class Slurm(Engine):
    """Asks Slurm for hosts and lets srun start the workers."""

    options: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "partition": "where to queue (any long option of sbatch may be given like this)",
            "account": "who pays",
            "time": "the limit, e.g. 04:00:00; with a checkpoint the job is queued again when it is reached",
            "output": "where the output goes (default: NAME-%j.out)",
            "setup": "a shell command before the workers start, such as `module load gcc`",
            "*": "any other long option of sbatch",
        }
    )

    def check(self, job: JobSpec) -> None:
        """Options that this engine writes itself are refused, and secrets would be readable in the script."""
        super().check(job)
        for name in job.engine_options:
            if name in _OWN:
                raise ConfigError(
                    f"engine slurm: {name}= is written from -n, --nodes, --resources and --name; leave it out"
                )
        if job.secret_file is not None:
            raise ConfigError("engine slurm: the job makes its own secret; leave out --secret-file")

    def preview(self, job: JobSpec) -> str:
        """The batch script."""
        return script(job)

    def run(self, job: JobSpec, *, console: Console) -> Outcome:
        """Submit and follow, or call srun inside an allocation."""
        if "SLURM_JOB_ID" in os.environ and shutil.which("srun"):
            return self._step(job, console)
        if shutil.which("sbatch") is None:
            raise ConfigError(
                "engine slurm: neither an allocation (SLURM_JOB_ID) nor the program sbatch is here; run this"
                " on a login node of the cluster, or print the script with --dry-run and submit it there"
            )
        with tempfile.TemporaryDirectory(prefix="paceline-slurm-") as folder:
            path = Path(folder) / "job.sh"
            path.write_text(script(job))
            return self._submit(job, path, console)

    def _step(self, job: JobSpec, console: Console) -> Outcome:
        program = Program(console)
        outcome = program.run(
            [*_srun(job), *job.command],
            environment={**os.environ, **_variables(job)},
            cwd=job.working_directory,
            splitters=(TaggedLines(_LABEL), TaggedLines(_LABEL)),
            grace_s=job.stop_grace_s,
        )
        for line in program.said if outcome.exit_code else ():
            console.note(line)
        return outcome

    def _submit(self, job: JobSpec, path: Path, console: Console) -> Outcome:
        program = Program(console)
        output = job.engine_options.get("output", f"{job.name}-%j.out")
        with _following(program, (job.working_directory or Path()) / output, console):
            outcome = program.run(
                ["sbatch", "--parsable", "--wait", str(path)],
                environment=os.environ,
                cwd=job.working_directory,
                splitters=(TaggedLines(_LABEL), TaggedLines(_LABEL)),
                grace_s=job.stop_grace_s,
                stop=lambda: ["scancel", *_number(program)],
            )
        for line in program.said[1:] if outcome.exit_code and outcome.signal is None else ():
            console.note(line)
        return outcome


def _number(program: Program) -> list[str]:
    """[job number] once sbatch has said it (`123` or `123;cluster`), else []."""
    first = program.said[0].split(";")[0].strip() if program.said else ""
    return [first] if first.isdigit() else []


@contextlib.contextmanager
def _following(program: Program, output: Path, console: Console) -> Iterator[None]:
    """Show the job's output file as it grows, if this host sees it."""
    over = threading.Event()
    reader = threading.Thread(target=_follow, args=(program, output, console, over), daemon=True)
    reader.start()
    try:
        yield
    finally:
        over.set()
        reader.join(10)


def _follow(program: Program, output: Path, console: Console, over: threading.Event) -> None:
    while not (number := _number(program)) and not over.is_set():
        time.sleep(_FOLLOW_S)
    if not number:
        return
    path, lines, position = Path(str(output).replace("%j", number[0])), TaggedLines(_LABEL), 0
    console.note(f"Slurm job {number[0]}; its output goes to {path}")
    is_last = False
    while not is_last:
        is_last = over.is_set()  # read once more after the end
        with contextlib.suppress(OSError), path.open("rb") as file:
            file.seek(position)
            data = file.read()
            position += len(data)
            for rank, text in lines.feed(data):
                shown = text.decode("utf-8", "replace").rstrip("\n")
                console.note(shown) if rank is None else console.line(rank, shown)
        if not is_last:
            over.wait(_FOLLOW_S)


def script(job: JobSpec) -> str:
    """What sbatch is given; `bash -n` accepts it."""
    lines = ["#!/bin/bash", *(f"#SBATCH {d}" for d in _directives(job)), "", "set -u"]
    if "setup" in job.engine_options:
        lines.append(job.engine_options["setup"])
    lines += [f"export {name}={shlex.quote(value)}" for name, value in sorted(_variables(job).items())]
    restarts = job.max_restarts or 0
    lines += [
        "",
        "# Slurm signals the workers (time limit, preemption); the shell itself must outlive that.",
        "trap : TERM USR1",
        f"{shlex.join(_srun(job))} \\",
        f"  {shlex.join(job.command)} &",
        "step=$!",
        "code=143",
        'while kill -0 "$step" 2>/dev/null; do wait "$step"; code=$?; done',
        "",
        f"# {_PREEMPTED}: a checkpoint was saved on SIGTERM; the job goes on when there is room again.",
        f'if [ "$code" -eq {_PREEMPTED} ]; then scontrol requeue "$SLURM_JOB_ID"; fi',
    ]
    if restarts:
        lines += [
            f'if [ "$code" -ne 0 ] && [ "$code" -ne {_PREEMPTED} ]'
            f' && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {restarts} ]; then',
            '  scontrol requeue "$SLURM_JOB_ID"',
            "fi",
        ]
    return "\n".join([*lines, 'exit "$code"', ""])


def _directives(job: JobSpec) -> Iterator[str]:
    yield f"--job-name={job.name}"
    yield f"--nodes={job.nodes}"
    yield f"--ntasks-per-node={job.num_workers}"
    if job.resources is not None:
        yield f"--cpus-per-task={max(1, math.ceil(job.resources.cpus))}"
        if job.resources.gpus:
            yield f"--gpus-per-task={math.ceil(job.resources.gpus)}"
        if job.resources.memory_bytes is not None:
            yield f"--mem={math.ceil(job.resources.memory_bytes * job.num_workers / 2**20)}M"
    if job.working_directory is not None:
        yield f"--chdir={job.working_directory.resolve()}"
    given = {k: v for k, v in job.engine_options.items() if k != "setup"}
    yield f"--output={given.pop('output', f'{job.name}-%j.out')}"
    yield "--open-mode=append"
    # Preemption and node failures queue the job again; it resumes from its checkpoint.
    yield "--requeue" if job.options.checkpoint or job.max_restarts else "--no-requeue"
    if "signal" not in given:
        yield f"--signal=TERM@{max(60, math.ceil(2 * job.stop_grace_s))}"
    for name, value in sorted(given.items()):
        yield f"--{name}={value}" if value else f"--{name}"


def _srun(job: JobSpec) -> list[str]:
    words = ["srun", "--label", "--kill-on-bad-exit=1", f"--nodes={job.nodes}"]
    words += [f"--ntasks={job.total_workers}", f"--ntasks-per-node={job.num_workers}"]
    if job.resources is not None:
        # srun does not take this over from the batch script any more (Slurm 22.05).
        words.append(f"--cpus-per-task={max(1, math.ceil(job.resources.cpus))}")
    return words


def _variables(job: JobSpec) -> dict[str, str]:
    options = JobOptions(**{**vars(job.options), "secret": "", "bar_columns": 0})
    threads = job.threads or (job.resources and int(max(1, job.resources.cpus))) or 1
    return {
        **job.environment,
        **options.to_environment(),
        "OMP_NUM_THREADS": str(threads),
        "PYTHONFAULTHANDLER": "1",
        "PYTHONUNBUFFERED": "1",
    }
