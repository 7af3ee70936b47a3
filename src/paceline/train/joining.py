"""`paceline.init()`: join the job that this process was started for."""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence

from paceline import plugins, torch_versions
from paceline.comm import current
from paceline.comm.fabric import connect
from paceline.comm.rendezvous.meeting import meet
from paceline.options import JobOptions
from paceline.train import random_state
from paceline.train.job import Job


def init(
    *,
    fabric: str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
    seed: int | None = None,
    log_dir: str | os.PathLike[str] | None = None,
    log_to: Sequence[str] | str | None = None,
    timeout_s: float = 600.0,
    host: str | None = None,
) -> Job:
    """Join the job that this process was started for, or be a job of one.

    Works under `paceline run`, torchrun, mpirun, srun, and alone; what the command line says wins over these
    arguments.

    Args:
        fabric: `"native"` (shared memory and TCP) or `"torch"` (a c10d group, Gloo on CPUs); default: native
            wherever all ranks can, and torch's for models on a GPU.
        checkpoint: Folder where SIGTERM saves and where `epochs` resumes; default: none.
        progress: Whether rank 0 shows a progress bar on a terminal; default true.
        seed: Seeds torch, NumPy and `random`, on all ranks alike until the first `prepare`, so that splits,
            shuffled lists and weights are the same; then each rank draws a stream of its own. Also seeds the
            order of the data. Default: unseeded.
        log_dir: Folder that `job.log` writes to; default `runs/<date>-<time>`.
        log_to: Log formats, as a list or with commas; default `"jsonl,csv"`; `"tensorboard"` needs the extra.
        timeout_s: How long to wait for other ranks, and deadline of an operation, in seconds; default 600.
        host: This rank's host identity; ranks with equal ones share memory. Default: found out.

    Raises:
        ConfigError: A wrong argument, or a fabric that cannot work here.
        Timeout: A rank did not come; names it.

    Example:
        `job = paceline.init(checkpoint="runs/mine")`
    """
    options = JobOptions.from_environment(os.environ).with_log(log_dir, log_to)
    for file in options.plugins:
        plugins.load(file, moved=True)
    virtual = current.provided()
    if virtual is not None:
        random_state.seed_worker(seed, 0)
        job = Job(virtual, options, seed=seed)
        current.at_end(job.detach)
        return job
    torch_versions.warn_if_newer()
    meeting = meet(host=host, timeout_s=timeout_s)
    random_state.seed_worker(seed, 0)
    comm = connect(meeting, options.fabric or fabric, timeout_s=timeout_s)
    comm.min_size = options.min_workers or comm.size
    path = options.checkpoint or (str(checkpoint) if checkpoint is not None else None)
    job = Job(
        comm,
        options,
        meeting=meeting,
        checkpoint=path,
        progress=progress and options.progress,
        seed=seed,
    )
    atexit.register(job.close)
    return job
