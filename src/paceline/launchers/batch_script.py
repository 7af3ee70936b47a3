"""A job as a batch script for Slurm: sbatch allocates hosts, and `srun` in the script starts the workers."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Iterator

from paceline.launchers.job import JobSpec

PREEMPTED = 75
"""Exit code of a worker that saved a checkpoint on SIGTERM: the job is to continue later."""


def batch_script(job: JobSpec) -> str:
    """The script for sbatch; `bash -n` accepts it."""
    lines = ["#!/bin/bash", *(f"#SBATCH {directive}" for directive in _directives(job)), "", "set -u"]
    if "setup" in job.engine_options:
        lines.append(job.engine_options["setup"])
    variables = sorted(worker_variables(job).items())
    lines += [f"export {name}={shlex.quote(value)}" for name, value in variables]
    lines += [
        "",
        "# Slurm signals the workers (time limit, preemption); the shell itself must outlive that.",
        "trap : TERM USR1",
        f"{shlex.join(srun_command(job))} \\",
        f"  {shlex.join(job.command)} &",
        "step=$!",
        "code=143",
        'while kill -0 "$step" 2>/dev/null; do wait "$step"; code=$?; done',
        "",
        f"# {PREEMPTED}: a checkpoint was saved on SIGTERM; the job continues when there is room again.",
        f'if [ "$code" -eq {PREEMPTED} ]; then scontrol requeue "$SLURM_JOB_ID"; fi',
    ]
    if job.max_restarts:
        lines += [
            f'if [ "$code" -ne 0 ] && [ "$code" -ne {PREEMPTED} ]'
            f' && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {job.max_restarts} ]; then',
            '  scontrol requeue "$SLURM_JOB_ID"',
            "fi",
        ]
    return "\n".join([*lines, 'exit "$code"', ""])


def output_file(job: JobSpec) -> str:
    """Name of the file for the job's output; Slurm replaces %j by the job's number."""
    return job.engine_options.get("output", f"{job.name}-%j.out")


def srun_command(job: JobSpec) -> list[str]:
    """srun with its options, without the worker's command."""
    words = ["srun", "--label", "--kill-on-bad-exit=1", f"--nodes={job.nodes}"]
    words += [f"--ntasks={job.total_workers}", f"--ntasks-per-node={job.num_workers}"]
    if job.resources is not None:
        # Since Slurm 22.05, srun no longer takes this from the batch script.
        words.append(f"--cpus-per-task={max(1, math.ceil(job.resources.cpus))}")
    return words


def worker_variables(job: JobSpec) -> dict[str, str]:
    """Environment variables for the workers. No secret: other users may be able to read the script."""
    options = dataclasses.replace(job.options, secret="", bar_columns=0)
    return {
        **job.environment,
        **options.to_environment(),
        "OMP_NUM_THREADS": str(job.remote_worker_threads),
        "PYTHONFAULTHANDLER": "1",
        "PYTHONUNBUFFERED": "1",
    }


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
    yield f"--output={output_file(job)}"
    yield "--open-mode=append"
    # After preemption or a node failure Slurm queues the job again; it resumes from its checkpoint.
    yield "--requeue" if job.options.checkpoint or job.max_restarts else "--no-requeue"
    given = {k: v for k, v in job.engine_options.items() if k not in ("setup", "output")}
    if "signal" not in given:
        yield f"--signal=TERM@{max(60, math.ceil(2 * job.stop_grace_s))}"
    for name, value in sorted(given.items()):
        yield f"--{name}={value}" if value else f"--{name}"
