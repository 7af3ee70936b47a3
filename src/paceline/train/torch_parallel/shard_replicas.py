"""Methods that average models, between the replicas of a model that FSDP2 shards: low communication between
groups of ranks, full sharding inside.

FSDP keeps its shards in memory of its own. A mirror of this rank's shards, as a module, is what the strategy
trains: after each step of the optimizer they are copied there, the strategy does what it does after a
minibatch, and they are copied back: two passes over a shard.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from paceline.comm.torch_fabric import TorchCommunicator
from paceline.errors import ConfigError
from paceline.strategies.base.strategy import TrainingStrategy, make
from paceline.train.job import Job


def averaging(text: str) -> TrainingStrategy:
    """The strategy of this string; ConfigError unless it averages models, all ranks together."""
    strategy = make(text)
    if strategy.needs_gradients or strategy.survives_loss or type(strategy).__module__.endswith(".single"):
        raise ConfigError(
            f"fsdp_comm: across={text!r}: between replicas of shards a codec is possible, or a method that"
            " averages models all together: local_sgd, bmuf, slowmo, diloco, streaming_diloco"
        )
    return strategy


class ShardReplicas:
    """This rank's shards, averaged with those of the same place in the other replicas.

    Args:
        strategy: As `averaging` makes it.
        comm: The ranks that hold the same shard.
        parameters: The model's, sharded by `fully_shard`.
        optimizer: What steps them; the strategy acts after each of its steps.
    """

    def __init__(
        self,
        strategy: TrainingStrategy,
        comm: TorchCommunicator,
        parameters: Iterable[nn.Parameter],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        trained = [p for p in parameters if p.requires_grad]
        self._shards = [p.to_local() if isinstance(p, DTensor) else p for p in trained]
        self._mirror = nn.ParameterList(shard.detach().clone() for shard in self._shards)
        self._step = torch.optim.SGD(self._mirror.parameters(), lr=0.0)  # never has a gradient to step by
        self.job = Job(comm)
        self.job.prepare(self._mirror, self._step, strategy=strategy)
        self._give_back()  # the model of the first replica
        self._handle = optimizer.register_step_post_hook(self._after_step)

    def synchronize(self) -> None:
        """Afterwards all replicas hold the final model; all ranks call it."""
        self._take()
        self.job.synchronize()
        self._give_back()

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of this rank; all ranks call it."""
        return self.job.collect_state()

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state`; all ranks call it, after the model's own checkpoint was loaded."""
        self.job.restore_state(state, state, self.job.size)
        self._give_back()

    def _after_step(self, *_: object) -> None:
        self._take()
        self._step.step()
        self._give_back()

    @torch.no_grad()
    def _take(self) -> None:
        for copy, shard in zip(self._mirror, self._shards, strict=True):
            copy.copy_(shard)

    @torch.no_grad()
    def _give_back(self) -> None:
        for copy, shard in zip(self._mirror, self._shards, strict=True):
            shard.copy_(copy)
