"""Asynchronous SGD with a parameter server in shards, hosted by the workers themselves.

Source: Dean et al. (Downpour SGD), NIPS 2012; Li et al. (parameter server), OSDI 2014; see `staleness/`.
A worker pushes its update Δ (what its optimizer changed, learning rate included), pulls the weights that
the others have moved on to; a shard does W ← W + rate · λ(s) · Δ, with s = clock at apply − clock at pull.
With `sends=gradients` the shards are the optimizer: v ← momentum·v + λ(s)·g, W ← W − rate·lr·v. `codec`
encodes updates and weights (see `server/encoding.py`).

Cost per minibatch: the model each way, once per push and pull interval, plus backups.   [tested]
"""

from __future__ import annotations

from typing import Any

import torch

from paceline import codecs
from paceline.errors import ConfigError
from paceline.spec import Spec
from paceline.strategies.base import staleness_policy
from paceline.strategies.base.strategy import TrainingStrategy
from paceline.strategies.server import encoding
from paceline.strategies.server.host import ShardHost
from paceline.strategies.server.script import Script
from paceline.strategies.server.shard import Optimizer, Shard
from paceline.strategies.server.slices import Slices, default_shards
from paceline.strategies.server.tally import summarize
from paceline.strategies.server.worker import Sender
from paceline.types import Communicator


class ParameterServer(TrainingStrategy):
    """Push updates, pull weights; nobody waits for anybody unless the staleness policy says so."""

    advice = "Nobody waits for stragglers: for uneven or busy machines. Shards spread load over all ports."
    replicas_differ = True
    survives_loss = True

    def __init__(
        self,
        *,
        shards: int | None = None,
        staleness: str | Spec | tuple[Spec, ...] = "constant",
        rate: float = 1.0,
        push: int = 1,
        pull: int = 1,
        prefetch: bool = False,
        sends: str | Spec = "updates",
        lr: float = 0.1,
        momentum: float = 0.0,
        backup: int | None = None,
        codec: str | Spec | None = None,
        record: str = "",
        replay: str = "",
    ) -> None:
        self.num_shards = None if shards is None else staleness_policy.whole("shards", shards, least=1)
        self.push, self.pull = (
            staleness_policy.whole("push", push, least=1),
            staleness_policy.whole("pull", pull, least=1),
        )
        self.backup = None if backup is None else staleness_policy.whole("backup", backup, least=0)
        self.needs_gradients = str(sends) == "gradients"
        if str(sends) not in ("updates", "gradients") or not rate > 0:
            raise ConfigError(f"sends={sends}, rate={rate}: updates or gradients, and rate > 0 expected")
        staleness_policy.make(staleness)  # a wrong policy is refused here, before any work
        self.staleness, self.prefetch, self._optimizer = staleness, prefetch, (rate, lr, momentum)
        self._codec = None if codec is None else codecs.make(codec)
        self._script = Script(replay=replay, record=record)
        self._kept: list[torch.Tensor] | None = None
        self._last_stats: dict[str, Any] = {}

    def attach(self, replica: Any, comm: Communicator) -> None:
        """Every rank hosts its share of the shards, filled from its own copy of the equal parameters."""
        super().attach(replica, comm)
        flats = replica.parameters
        n = self.num_shards or default_shards(sum(f.nbytes for f in flats), comm.size)
        slices = Slices(flats, n)
        encoding.check(self._codec, flats)
        self._script.check(n, comm.size)
        self.worker = Sender(slices, flats, n, comm, self._codec)

        def make_shard(j: int, weights: list[torch.Tensor]) -> Shard:
            optimizer = Optimizer(self.needs_gradients, *self._optimizer)
            stale = staleness_policy.make(self.staleness)
            return Shard(weights, stale, optimizer, comm.size, comm.deferred, self._codec)

        every = comm.size if self.backup is None else self.backup
        given = (comm, n, make_shard, lambda j: slices.of(flats, j), self.worker.remembered)
        self.host = ShardHost(*given, backup_every=every, script=self._script)

    def before_update(self) -> None:
        """Keep the gradient (the pull overwrites the local step), or what a repeated batch would spoil."""
        if not self.replica.has_samples:
            self._kept = [flat.clone() for flat in self.replica.parameters]
            return
        if self.needs_gradients:
            self.worker.add_gradients(self.replica.gradients, self.replica.weight)

    def after_update(self) -> None:
        """Push and pull, as their intervals say."""
        self.replica.adopt()
        if self._kept is not None:
            torch._foreach_copy_(list(self.replica.parameters), self._kept)
            self._kept = None
        when = (self.push, self.pull, self.prefetch)
        self.worker.step(self.host, *when, sends_gradients=self.needs_gradients)

    update_skipped = after_update

    def synchronize(self) -> None:
        """Wait until all living workers have come here; all then hold the shards' final weights."""
        self.replica.adopt()
        answers = self.worker.finish(self.host, sends_gradients=self.needs_gradients)
        self._last_stats = summarize([a.tensors[-1] for a in answers], [dict(a.header) for a in answers])
        self._script.save(self.comm.rank)

    def rest(self) -> None:
        """Nobody needs to wait for this worker until it comes back."""
        self.worker.rest(self.host)

    def consensus(self) -> list[torch.Tensor] | None:
        """The weights on the shards. Workers rest meanwhile, and go on from what they had pulled."""
        self.rest()
        self.comm.barrier().wait()
        flats = self.worker.peek(self.host)
        self.comm.barrier().wait()  # nobody pushes before all have read
        return flats

    def stats(self) -> dict[str, Any]:
        """Staleness of the last pull; that of all applied updates is known after `synchronize`."""
        codec = encoding.stats(self._codec, self.worker.pushes, self.host.shards.values())
        return {"staleness": self.worker.staleness, **self._last_stats, **codec}

    def state_dict(self) -> dict[str, Any]:
        """The worker's side, and the shards of this rank."""
        return {"worker": self.worker.state_dict(), "shards": self.host.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue."""
        self.worker.load_state_dict(state["worker"])
        self.host.load_state_dict(state["shards"])

    def traffic(self, model_bytes: int, size: int) -> float:
        """Δ up and W down at their intervals, W to the backup every so many updates."""
        backup = size if self.backup is None else self.backup
        copies = (
            1 / (self.push * staleness_policy.make(self.staleness).group * backup)
            if backup and size > 1
            else 0.0
        )
        shards = self.num_shards or default_shards(model_bytes, size)
        progress, once = 16 * size * shards, encoding.encoded_bytes(self._codec, model_bytes, shards, self)
        rounds = 1 / self.push + 1 / self.pull
        return once * rounds + model_bytes * copies + progress * (1 / self.pull + copies)
