"""What `prepare` does: check that the ranks hold the same model, make them equal, lay it out, attach."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from paceline.comm.spread import of_all_ranks
from paceline.errors import ConfigError, Mismatch, RunLengthWarning
from paceline.spec import whole_number
from paceline.strategies.base.strategy import TrainingStrategy
from paceline.train import plain
from paceline.train.attachment import Attachment
from paceline.train.clock import TrainingClock
from paceline.train.data.fingerprint import UNKNOWN, different, digest, exact
from paceline.train.data.loader import ShardedLoader, known_length
from paceline.train.gradients.weights import check_reduction
from paceline.train.heap import keep_freed_memory
from paceline.train.modules import sync_batch_norm
from paceline.train.modules.flat_tensors import flattened, unflatten
from paceline.train.optimizer_steps import stateful
from paceline.train.replica import FlatReplica, real
from paceline.types import Communicator, named

_NEAR_BUCKET_BYTES = 8 << 20


@dataclass(frozen=True)
class Settings:
    """What `prepare` was told about the loop; equal on all ranks."""

    accumulation_steps: int = 1
    loss_reduction: str = "mean"
    sync_batch_norm: bool = False


def attach(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    strategy: TrainingStrategy,
    comm: Communicator,
    settings: Settings,
) -> Attachment:
    """Make every rank's model and optimizers equal to rank 0's and hand them to the strategy.

    Args:
        model: The module.
        optimizers: Those that hold parameters of it.
        strategy: A new one, whose `scope` is this model's.
        comm: What moves this model's tensors.
        settings: What `prepare` was told about the loop.
    """
    _check(model, strategy, comm, settings)
    _check_same_everywhere(model, strategy, comm, settings)
    linked = sync_batch_norm.find(model, converts=settings.sync_batch_norm)
    sync_batch_norm.check(linked, waits=not strategy.survives_loss or comm.size == 1, name=strategy.name)
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
        broadcast_all([*map(real, replica.frozen), *replica.buffers()], comm)
        for optimizer in map(stateful, optimizers):
            _load_rank_0(optimizer, comm)
    if strategy.survives_loss:
        comm.tolerate_loss()
    strategy.attach(replica, comm)
    one = Attachment(
        replica,
        strategy,
        comm,
        accumulation_steps=settings.accumulation_steps,
        loss_reduction=settings.loss_reduction,
    )
    if linked and comm.size > 1:
        one.keep(sync_batch_norm.LinkedModules(linked, comm, one.weights))
        one.cut_outputs()
    return one


def _load_rank_0(optimizer: torch.optim.Optimizer, comm: Communicator) -> None:
    """Rank 0's state and settings. Nothing is loaded where all are equal: loading makes new groups.

    What is wrapped around an optimizer, or schedules its rate, may hold on to the groups that it knows.
    """
    state = optimizer.state_dict()
    if different(exact(plain.pack(plain.simple(state)).numpy().tobytes()), comm):
        state = plain.broadcast(plain.simple(state), comm)
        if comm.rank > 0:
            optimizer.load_state_dict(state)


def fit(
    attachments: Sequence[Attachment],
    loaders: Sequence[ShardedLoader],
    epochs: int,
    comm: Communicator,
    clock: TrainingClock,
) -> None:
    """Tell every strategy how long the run over the first loader is; rank 0 warns of what does not suit it.

    Rank 0's length holds for all, so that all set the same defaults. Nothing is told of a loader without one.
    """
    if not attachments or not loaders:
        return
    first = loaders[0]
    length = torch.tensor([known_length(first) or 0, first.local_batch_size])
    if comm.size > 1:
        with clock.paused():
            comm.broadcast(length).wait()
    for attachment in attachments:
        passes = attachment.accumulation_steps
        num_steps, batch_size = epochs * int(length[0]) // passes, int(length[1]) * passes
        note = attachment.strategy.fit(num_steps, comm.size, batch_size) if num_steps else ""
        if note and comm.rank == 0:
            warnings.warn(f"strategy {attachment.strategy.name}: {note}", RunLengthWarning, stacklevel=2)


def _bucket_bytes(strategy: TrainingStrategy, comm: Communicator) -> int:
    """Through shared memory a bucket starts in microseconds, and only the last one is waited for."""
    is_near = comm.fabric == "native" and len(set(comm.hosts)) == 1
    return min(strategy.bucket_bytes, _NEAR_BUCKET_BYTES) if is_near else strategy.bucket_bytes


def broadcast_all(tensors: Sequence[torch.Tensor], comm: Communicator) -> None:
    """Replace every tensor by rank 0's, one message per dtype."""
    for flat, group in flattened(t for t in tensors if t.numel()):
        comm.broadcast(flat).wait()
        unflatten(flat, group)


def shared_state(replica: FlatReplica, comm: Communicator) -> list[torch.Tensor]:
    """What the ranks share without training it: buffers, and frozen parameters that differ. Collective.

    Frozen parameters are what a loop or a forward pass may change by itself (averages, code books), or large
    and constant: only those are meant of which evenly spread elements are not equal on all ranks.
    """
    frozen = [real(p.detach()) for p in replica.frozen]
    if comm.size == 1 or not frozen:
        return replica.buffers()
    own = torch.tensor([digest(one) for one in frozen])
    rows = of_all_ranks(own, comm)
    differ = ((rows != own) & (rows != UNKNOWN)).any(0)  # all ranks see it or none
    return [*replica.buffers(), *(one for one, is_other in zip(frozen, differ, strict=True) if is_other)]


def average_buffers(tensors: Sequence[torch.Tensor], comm: Communicator) -> None:
    """Replace floating-point tensors by their mean over ranks, others by rank 0's.

    What is equal on all ranks stays as it is, bit for bit, infinities too: constants, tables and masks. The
    mean is therefore rank 0's value and the mean of the differences from it.
    """
    floats = [t for t in tensors if t.is_floating_point() and t.numel()]
    for own, group in flattened(floats):
        first = own.clone()
        comm.broadcast(first).wait()
        difference = torch.where(own == first, 0.0, (own - first).mul_(1.0 / comm.size)).to(own.dtype)
        comm.all_reduce(difference).wait()
        unflatten(torch.where(difference == 0, first, first + difference), group)
    broadcast_all([t for t in tensors if not t.is_floating_point()], comm)


def _check(
    model: nn.Module,
    strategy: TrainingStrategy,
    comm: Communicator,
    settings: Settings,
) -> None:
    if strategy.max_workers is not None and comm.size > strategy.max_workers:
        name = type(strategy).__module__.rsplit(".", 1)[-1]
        raise ConfigError(
            f"strategy {name!r} trains on {strategy.max_workers} worker, this job has {comm.size};"
            " start one worker or choose another strategy (`paceline strategies` lists them)"
        )
    if comm.min_size < comm.size and not strategy.survives_loss:
        raise ConfigError(
            f"strategy {strategy.name}: it cannot go on without a lost worker, as --min-workers"
            f" {comm.min_size} asks it to; use parameter_server, gossip or decentralized_threshold, or leave"
            " --min-workers out: --max-restarts N with --checkpoint PATH begins again from the last save"
        )
    whole_number("accumulation_steps", settings.accumulation_steps, least=1)
    check_reduction(settings.loss_reduction)
    if strategy.needs_gradients and comm.size > 1:
        for name, module in model.named_modules():
            _check_module(name or type(module).__name__, module)


def _check_module(name: str, module: nn.Module) -> None:
    """ConfigError for one whose gradients cannot be summed, or that changes its weights by itself."""
    if getattr(module, "sparse", False) is True and any(p.requires_grad for p in module.parameters()):
        raise ConfigError(
            f"module {name} makes sparse gradients, which dense buckets cannot carry; use sparse=False (with"
            " Adam in place of SparseAdam), or strategy='local_sgd(...)'"
        )
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
        raise ConfigError(
            f"module {name} has max_norm={module.max_norm}: in forward it would shrink the rows that this"
            " rank's samples use, so the replicas would drift apart; use max_norm=None and, after"
            f" optimizer.step(), under torch.no_grad(), weight.renorm_({module.norm_type:g}, 0,"
            f" {module.max_norm}); or strategy='local_sgd(...)'"
        )


def _check_same_everywhere(
    model: nn.Module, strategy: TrainingStrategy, comm: Communicator, settings: Settings
) -> None:
    """Different models on different ranks would otherwise end in a hang or in silent nonsense."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    text = repr(
        [(n, tuple(t.shape), str(t.dtype), t.requires_grad) for n, t in tensors]
        + [type(strategy).__module__, settings]
    )
    if others := different(exact(text.encode()), comm):
        raise Mismatch(
            f"rank {comm.rank}: {named(others)} prepared another model (names, shapes, dtypes, frozen"
            " parameters), strategy or settings of prepare() than rank 0: the script must build the same"
            " everywhere"
        )


def check_owners(optimizers: Sequence[torch.optim.Optimizer], models: Sequence[nn.Module]) -> None:
    """ConfigError for an optimizer with parameters that are in none of the prepared models."""
    own = {id(p) for model in models for p in model.parameters()}
    for optimizer in optimizers:
        strangers = [tuple(p.shape) for g in optimizer.param_groups for p in g["params"] if id(p) not in own]
        if strangers:
            raise ConfigError(
                f"{type(optimizer).__name__} holds {len(strangers)} parameters that are not in the model"
                f" (shapes {strangers[:3]}): prepare all models that it trains in one call, or put them into"
                " one nn.Module and make the optimizer from it"
            )
