"""What a checkpoint holds: all that a continued run would use, so that a resumed one is the same."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from paceline.errors import CheckpointError
from paceline.train import random_state

if TYPE_CHECKING:
    from paceline.train.attachment import Attachment
    from paceline.train.job import Job


def collect(job: Job, extra: Mapping[str, Any] | None) -> dict[str, Any]:
    """This rank's shard. Collective: a strategy may have to agree on its consensus model."""
    return {
        "models": [_collect_model(job, a) for a in job.attachments],
        "registered": {name: thing.state_dict() for name, thing in job.registered.items()},
        "loaders": [loader.state_dict() for loader in job.loaders],
        "random": random_state.capture(),
        "job": {
            "next_epoch": job.next_epoch,
            "step": job.step,
            "samples": job.samples,
            "training_s": job.clock.seconds,
            "strategies": [str(type(a.strategy).__module__) for a in job.attachments],
        },
        "extra": dict(extra or {}),
    }


def _collect_model(job: Job, attachment: Attachment) -> dict[str, Any]:
    if attachment.is_mid_window:
        raise CheckpointError(
            f"rank {job.rank}: save() between backward() and optimizer.step(), or inside an accumulation"
            " window: gradients are not saved. Save after optimizer.step()"
        )
    attachment.finish_minibatch()
    replica, strategy = attachment.replica, attachment.strategy
    replica.adopt()
    state: dict[str, Any] = {
        "strategy": strategy.state_dict(),
        "minibatches": attachment.minibatches,
        "buffers": [b.detach().clone() for b in replica.buffers()],
    }
    if strategy.replicas_differ or job.rank == 0:
        state["model"] = {
            # Clones: the parameters are views, and a view would be saved with the whole flat buffer.
            key: value.detach().clone() if isinstance(value, torch.Tensor) else value
            for key, value in replica.module.state_dict().items()
        }
        state["optimizers"] = [o.state_dict() for o in replica.optimizers]
    consensus = strategy.consensus()
    if consensus is not None and job.rank == 0:
        state["consensus"] = consensus
    return state


def restore(job: Job, own: dict[str, Any], first: dict[str, Any], saved_size: int) -> dict[str, Any]:
    """Put a checkpoint's state into the prepared job; returns what was saved as `extra`.

    From another number of ranks only the model, optimizers, registered objects and the epoch are taken.
    """
    _check_fits(job, first)
    same_size = saved_size == job.size
    for attachment, mine, main in zip(job.attachments, own["models"], first["models"], strict=True):
        _restore_model(attachment, mine, main, same_size=same_size)
    for name, thing in job.registered.items():
        if name not in own["registered"]:
            raise CheckpointError(f"the checkpoint holds no {name!r}; it holds {sorted(own['registered'])}")
        thing.load_state_dict(own["registered"][name])
    facts = own["job"]
    job.step, job.samples = facts["step"], facts["samples"]
    job.set_resumed(facts["next_epoch"], facts["training_s"])
    if same_size:
        for loader, position in zip(job.loaders, own["loaders"], strict=True):
            loader.load_state_dict(position)
        random_state.restore(own["random"])
    else:
        _restore_elsewhere(job, first, saved_size)
    extra: dict[str, Any] = own["extra"]
    return extra


def _check_fits(job: Job, first: dict[str, Any]) -> None:
    here = [str(type(a.strategy).__module__) for a in job.attachments]
    there = first["job"]["strategies"]
    if len(here) != len(there) or len(job.loaders) != len(first["loaders"]):
        raise CheckpointError(
            f"the checkpoint was saved with {len(there)} prepared models and {len(first['loaders'])}"
            f" loaders, this job has {len(here)} and {len(job.loaders)}: load after the same prepare()"
            " calls as when saving"
        )
    if here != there:
        names = [[n.rsplit(".", 1)[-1] for n in side] for side in (there, here)]
        raise CheckpointError(f"the checkpoint was saved with strategy {names[0]}, this job uses {names[1]}")


def _restore_model(
    attachment: Attachment, own: dict[str, Any], first: dict[str, Any], *, same_size: bool
) -> None:
    replica = attachment.replica
    source = own if "model" in own else first
    try:
        replica.module.load_state_dict(source["model"])
        for optimizer, state in zip(replica.optimizers, source["optimizers"], strict=True):
            optimizer.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"the checkpoint does not fit this model or optimizer: {error}") from error
    replica.adopt()
    with torch.no_grad():
        if same_size:
            for buffer, value in zip(replica.buffers(), own["buffers"], strict=True):
                buffer.copy_(value)
            attachment.strategy.load_state_dict(own["strategy"])
        elif "consensus" in first:
            for flat, value in zip(replica.parameters, first["consensus"], strict=True):
                flat.copy_(value)
    attachment.minibatches = own["minibatches"]


def _restore_elsewhere(job: Job, first: dict[str, Any], saved_size: int) -> None:
    epochs = [position["epoch"] for position in first["loaders"]]
    for loader, epoch, position in zip(job.loaders, epochs, first["loaders"], strict=True):
        loader.epoch, loader.step = epoch, 0
        del position
    if job.is_main:
        mid = any(position["step"] for position in first["loaders"])
        ranks = f"{saved_size} ranks" if saved_size else "a job that had lost ranks"
        warnings.warn(
            f"checkpoint of {ranks} loaded into {job.size}: model, optimizer and epoch are taken"
            " over, random states and the strategy's state start afresh"
            + ("; the epoch that was interrupted starts again" if mid else ""),
            stacklevel=4,
        )
