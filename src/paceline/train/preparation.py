"""What `prepare` does: check that the ranks hold the same model, make them equal, lay it out, attach."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from paceline.errors import ConfigError, Mismatch
from paceline.spec import whole_number
from paceline.strategies.base.strategy import TrainingStrategy
from paceline.train import plain
from paceline.train.attachment import Attachment
from paceline.train.heap import keep_freed_memory
from paceline.train.replica import FlatReplica
from paceline.types import Communicator

_NEAR_BUCKET_BYTES = 8 << 20


def attach(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    strategy: TrainingStrategy,
    comm: Communicator,
    *,
    accumulation_steps: int,
) -> Attachment:
    """Make every rank's model and optimizers equal to rank 0's and hand them to the strategy."""
    _check(model, optimizers, strategy, comm, accumulation_steps)
    _check_same_everywhere(model, strategy, comm, accumulation_steps)
    replica = FlatReplica(
        model,
        comm,
        needs_gradients=strategy.needs_gradients and comm.size > 1,
        bucket_bytes=_bucket_bytes(strategy, comm),
        optimizers=optimizers,
    )
    if all(flat.is_cpu for flat in replica.parameters):
        keep_freed_memory(os.environ)
    if comm.size > 1:
        for flat in replica.parameters:
            comm.broadcast(flat).wait()
        broadcast_all([*replica.frozen, *replica.buffers()], comm)
        for optimizer in optimizers:
            state = plain.broadcast(optimizer.state_dict(), comm)
            if comm.rank > 0:
                optimizer.load_state_dict(state)
    if strategy.survives_loss:
        comm.tolerate_loss()
    strategy.attach(replica, comm)
    return Attachment(replica, strategy, comm, accumulation_steps=accumulation_steps)


def _bucket_bytes(strategy: TrainingStrategy, comm: Communicator) -> int:
    """Through shared memory a bucket starts in microseconds, and only the last one is waited for."""
    is_near = comm.fabric == "native" and len(set(comm.hosts)) == 1
    return min(strategy.bucket_bytes, _NEAR_BUCKET_BYTES) if is_near else strategy.bucket_bytes


def broadcast_all(tensors: Sequence[torch.Tensor], comm: Communicator) -> None:
    """Replace every tensor by rank 0's, one message per dtype."""
    for dtype, device in dict.fromkeys((t.dtype, t.device) for t in tensors):
        group = [t for t in tensors if (t.dtype, t.device) == (dtype, device) and t.numel()]
        if group:
            flat = torch.cat([t.detach().reshape(-1) for t in group])
            comm.broadcast(flat).wait()
            unflatten(flat, group)


def average_buffers(tensors: Sequence[torch.Tensor], comm: Communicator) -> None:
    """Replace floating-point tensors by their mean over ranks, others by rank 0's."""
    floats = [t for t in tensors if t.is_floating_point() and t.numel()]
    for dtype, device in dict.fromkeys((t.dtype, t.device) for t in floats):
        group = [t for t in floats if (t.dtype, t.device) == (dtype, device)]
        flat = torch.cat([t.detach().reshape(-1) for t in group]).mul_(1.0 / comm.size)
        comm.all_reduce(flat).wait()
        unflatten(flat, group)
    broadcast_all([t for t in tensors if not t.is_floating_point()], comm)


def unflatten(flat: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
    """Copy consecutive pieces of `flat` into `tensors`."""
    with torch.no_grad():
        for piece, tensor in zip(torch.split(flat, [t.numel() for t in tensors]), tensors, strict=True):
            tensor.copy_(piece.view(tensor.shape))


def _check(
    model: object,
    optimizers: Sequence[Any],
    strategy: TrainingStrategy,
    comm: Communicator,
    accumulation_steps: int,
) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"prepare() takes a torch.nn.Module first, got {type(model).__name__}")
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise ConfigError(
            f"prepare() takes the plain module, not {type(model).__name__}: leave that wrapper out"
        )
    if strategy.max_workers is not None and comm.size > strategy.max_workers:
        name = type(strategy).__module__.rsplit(".", 1)[-1]
        raise ConfigError(
            f"strategy {name!r} trains on {strategy.max_workers} worker, this job has {comm.size};"
            " start one worker or choose another strategy (`paceline strategies` lists them)"
        )
    whole_number("accumulation_steps", accumulation_steps, least=1)
    own = {id(p) for p in model.parameters()}
    for optimizer in optimizers:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ConfigError(f"prepare() takes a torch.optim.Optimizer, got {type(optimizer).__name__}")
        strangers = [tuple(p.shape) for g in optimizer.param_groups for p in g["params"] if id(p) not in own]
        if strangers:
            raise ConfigError(
                f"{type(optimizer).__name__} holds {len(strangers)} parameters that are not in the model"
                f" (shapes {strangers[:3]}): put all trained modules into one nn.Module and make the"
                " optimizer from it"
            )
    if strategy.needs_gradients and comm.size > 1:
        for name, module in model.named_modules():
            if getattr(module, "sparse", False) is True and any(p.requires_grad for p in module.parameters()):
                raise ConfigError(
                    f"module {name or type(module).__name__} makes sparse gradients, which dense buckets"
                    " cannot carry; use sparse=False or strategy='local_sgd(...)'"
                )


def _check_same_everywhere(
    model: nn.Module, strategy: TrainingStrategy, comm: Communicator, accumulation_steps: int
) -> None:
    """Different models on different ranks would otherwise end in a hang or in silent nonsense."""
    if comm.size == 1:
        return
    tensors = [*model.named_parameters(), *model.named_buffers()]
    text = repr(
        [(n, tuple(t.shape), str(t.dtype), t.requires_grad) for n, t in tensors]
        + [type(strategy).__module__, accumulation_steps]
    )
    mine = torch.tensor([int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")])
    everyone = torch.empty(comm.size, dtype=torch.int64)
    comm.all_gather(everyone, mine).wait()
    different = [r for r in range(comm.size) if everyone[r] != everyone[0]]
    if different:
        raise Mismatch(
            f"rank {comm.rank}: ranks {different} prepared another model (names, shapes, dtypes, frozen"
            " parameters), strategy or accumulation_steps than rank 0: the script must build the same"
            " everywhere"
        )
