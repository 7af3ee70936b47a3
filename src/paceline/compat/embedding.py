"""A job inside another framework's loop: the model to evaluate or save, and state in its files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

import paceline
from paceline.errors import CheckpointError, ConfigError
from paceline.train.evaluate import consensus
from paceline.train.job import Job

KEY = "paceline"
"""Where a framework's checkpoint holds our state."""


def join(framework: str, *, fabric: str | None, log_dir: str | None = None) -> Job:
    """`paceline.init()` for a process whose loop, seeds and checkpoints are the framework's."""
    job: Job = paceline.init(fabric=fabric, progress=False, log_dir=log_dir)
    if job.options.checkpoint is not None:
        raise ConfigError(
            f"--checkpoint {job.options.checkpoint}: here {framework} saves and resumes; leave the option out"
        )
    return job


def count_samples(job: Job, model: nn.Module) -> RemovableHandle:
    """Count the samples that the model trains on: rows of the first tensor that each call gets."""

    def count(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        if module.training:
            batches = (v for v in (*arguments, *named.values()) if isinstance(v, torch.Tensor) and v.ndim)
            job.samples += len(next(batches, ())) * job.size

    return model.register_forward_pre_hook(count, with_kwargs=True)


@contextmanager
def consensus_model(job: Job) -> Iterator[None]:
    """Inside, the prepared modules hold the model to evaluate or save; all ranks enter together.

    Training goes on afterwards as if nothing had happened.
    """
    with job.clock.paused():
        for attachment in job.attachments:
            attachment.finish_minibatch()
        with consensus(job.attachments, job.comm):
            yield


def state_of_all_ranks(job: Job) -> dict[str, Any]:
    """What a resumed run needs beyond model and optimizer, of every rank; all ranks call it."""
    with job.clock.paused():
        return {"size": job.size, "ranks": job.gather_objects(job.collect_state())}


def restore(job: Job, state: dict[str, Any]) -> None:
    """Continue from `state_of_all_ranks`; with another number of ranks, as far as that can be."""
    ranks = state["ranks"]
    if not ranks:
        raise CheckpointError("the checkpoint's paceline state is empty")
    own = ranks[job.rank] if state["size"] == job.size else ranks[0]
    with job.clock.paused():
        job.restore_state(own, ranks[0], state["size"])
