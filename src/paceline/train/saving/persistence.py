"""What a checkpoint holds: all that a continued run would use, so that a resumed one is the same."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from paceline.errors import CheckpointError
from paceline.train import random_state
from paceline.train.attachment import Attachment
from paceline.train.data.loader import ShardedLoader
from paceline.train.optimizer_steps import check_classes, classes, stateful
from paceline.train.replica import compact


class Stateful(Protocol):
    """A scheduler, a scaler, or whatever else a checkpoint includes by name."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> object: ...


@dataclasses.dataclass(frozen=True)
class JobPosition:
    """How far a job has trained."""

    next_epoch: int
    """The epoch at which a run that is loaded from here continues."""
    step: int
    samples: int
    training_s: float
    passes_done: list[int]
    """Of each loader, how many passes are over of the epoch that goes on; they are not trained again."""


@dataclasses.dataclass(frozen=True)
class JobParts:
    """Whose state a checkpoint holds."""

    rank: int
    size: int
    attachments: Sequence[Attachment]
    loaders: Sequence[ShardedLoader]
    registered: Mapping[str, Stateful]


def free_name(registered: Mapping[str, Stateful], name: str, thing: object) -> str:
    """`name`, or with the first number behind it that no other thing is registered under."""
    number = 0
    while registered.get(f"{name}{number or ''}", thing) is not thing:
        number += 1
    return f"{name}{number or ''}"


def collect(parts: JobParts, position: JobPosition, extra: Mapping[str, Any] | None) -> dict[str, Any]:
    """This rank's shard. Collective: a strategy may have to agree on its consensus model."""
    return {
        "models": [_collect_model(a, parts.rank) for a in parts.attachments],
        "registered": {name: thing.state_dict() for name, thing in parts.registered.items()},
        "loaders": [loader.state_dict() for loader in parts.loaders],
        "random": random_state.capture(),
        "job": {
            **dataclasses.asdict(position),
            "strategies": [str(type(a.strategy).__module__) for a in parts.attachments],
        },
        "extra": dict(extra or {}),
    }


def _collect_model(attachment: Attachment, rank: int) -> dict[str, Any]:
    if attachment.waiting_backwards:
        raise CheckpointError(
            f"rank {rank}: save() between backward() and optimizer.step(), or inside an accumulation"
            " window: gradients are not saved. Save after the optimizer.step() that ends the window; with"
            " job.accumulate after a block at whose end job.sync_gradients is true"
        )
    attachment.finish_minibatch()
    replica, strategy = attachment.replica, attachment.strategy
    replica.adopt()
    state: dict[str, Any] = {
        "strategy": strategy.state_dict(),
        "minibatches": attachment.minibatches,
        "buffers": [b.detach().clone() for b in replica.buffers()],
    }
    if strategy.replicas_differ or rank == 0:
        state["model"] = {
            # Clones: the parameters are views, and a view would be saved with the whole flat buffer.
            key: value.detach().clone() if isinstance(value, torch.Tensor) else value
            for key, value in replica.module.state_dict().items()
        }
        state["optimizers"] = [stateful(o).state_dict() for o in replica.optimizers]
        state["classes"] = classes(replica.optimizers)
    consensus = strategy.consensus()
    if consensus is not None and rank == 0:
        state["consensus"] = consensus
    return state


def restore(
    parts: JobParts, own: dict[str, Any], first: dict[str, Any], saved_size: int
) -> tuple[JobPosition, dict[str, Any]]:
    """Put a checkpoint's state into a prepared job; returns its position, and what was saved as `extra`.

    From another number of ranks only the model, optimizers, registered objects and the position in the data
    are taken.
    """
    _check_fits(parts, first)
    same_size = saved_size == parts.size
    for attachment, mine, main in zip(parts.attachments, own["models"], first["models"], strict=True):
        _restore_model(attachment, mine, main, same_size=same_size)
    for name, thing in parts.registered.items():
        if name not in own["registered"]:
            raise CheckpointError(f"the checkpoint holds no {name!r}; it holds {sorted(own['registered'])}")
        thing.load_state_dict(own["registered"][name])
    if same_size:
        for loader, position in zip(parts.loaders, own["loaders"], strict=True):
            loader.load_state_dict(position)
        random_state.restore(own["random"])
    else:
        _restore_elsewhere(parts, first, saved_size)
    saved = own["job"]
    fields = {f.name: saved[f.name] for f in dataclasses.fields(JobPosition)}
    return JobPosition(**fields), own["extra"]


def _load_module(module: nn.Module, state: dict[str, Any]) -> None:
    """As `load_state_dict`, which cannot write to expanded buffers."""
    expanded = {n: b for n, b in module.named_buffers() if n in state and compact(b) is not b}
    found = module.load_state_dict({k: v for k, v in state.items() if k not in expanded}, strict=False)
    missing = set(found.missing_keys) - set(expanded)
    if missing or found.unexpected_keys:
        raise KeyError(f"missing {sorted(missing)}, unexpected {found.unexpected_keys}")
    with torch.no_grad():
        for name, buffer in expanded.items():
            small = compact(buffer)
            small.copy_(state[name][tuple(slice(0, size) for size in small.shape)])


def _check_fits(parts: JobParts, first: dict[str, Any]) -> None:
    here = [str(type(a.strategy).__module__) for a in parts.attachments]
    there = first["job"]["strategies"]
    if len(here) != len(there) or len(parts.loaders) != len(first["loaders"]):
        raise CheckpointError(
            f"the checkpoint was saved with {len(there)} prepared models and {len(first['loaders'])}"
            f" loaders, this job has {len(here)} and {len(parts.loaders)}: load after the same prepare()"
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
    if replica.optimizers:
        check_classes(source["classes"], replica.optimizers)
    try:
        _load_module(replica.module, source["model"])
        if replica.optimizers:
            for optimizer, state in zip(map(stateful, replica.optimizers), source["optimizers"], strict=True):
                optimizer.load_state_dict(state)
        else:
            # For one that is made after prepare.
            replica.late_states = list(zip(source["classes"], source["optimizers"], strict=True))
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"the checkpoint does not fit this model or optimizer: {error}") from error
    replica.adopt()
    with torch.no_grad():
        if same_size:
            for buffer, value in zip(replica.buffers(), own["buffers"], strict=True):
                buffer.copy_(value)
            device = replica.parameters[0].device if replica.parameters else torch.device("cpu")
            attachment.strategy.load_state_dict(_placed(own["strategy"], device))
        elif "consensus" in first:
            for flat, value in zip(replica.parameters, first["consensus"], strict=True):
                flat.copy_(value)
    attachment.minibatches = own["minibatches"]


def _placed(value: Any, device: torch.device) -> Any:
    """A strategy's state with its floating-point tensors (models, residuals, momenta) on `device`."""
    if isinstance(value, torch.Tensor):
        return value.to(device) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _placed(one, device) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_placed(one, device) for one in value)
    return value


def _restore_elsewhere(parts: JobParts, first: dict[str, Any], saved_size: int) -> None:
    for loader, position in zip(parts.loaders, first["loaders"], strict=True):
        loader.load_elsewhere(position)
    if parts.rank == 0:
        ranks = f"{saved_size} ranks" if saved_size else "a job that had lost ranks"
        warnings.warn(
            f"checkpoint of {ranks} loaded into {parts.size}: model, optimizer and position in the data are"
            " taken over, random states and the strategy's state start fresh",
            stacklevel=4,
        )
