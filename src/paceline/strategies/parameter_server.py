"""Asynchronous SGD with a parameter server in shards, hosted by the workers themselves.

A worker pushes its update Δ (what its optimizer changed, learning rate included) and pulls the weights, which
the others have changed too; a shard does W ← W + rate · λ(s) · Δ, with s = clock at apply − clock at pull.
With `sends=gradients` the shards are the optimizer: v ← momentum·v + λ(s)·g, W ← W − rate·lr·v.

Cost per minibatch: the model each way, once per push and pull interval, plus backups.   [tested]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from paceline import codecs
from paceline.errors import ConfigError
from paceline.spec import Spec, whole_number
from paceline.strategies.base import staleness_policy
from paceline.strategies.base.periodic import PeriodicStrategy
from paceline.strategies.base.slices import Slices
from paceline.strategies.server import encoding
from paceline.strategies.server.client import ShardClient
from paceline.strategies.server.host import ShardHost
from paceline.strategies.server.ownership import default_shards
from paceline.strategies.server.protocol import RankView
from paceline.strategies.server.recording import Recording
from paceline.strategies.server.shard import Shard, ShardOptimizer
from paceline.strategies.server.tally import summarize
from paceline.types import Communicator, Replica


class ParameterServer(PeriodicStrategy):
    """Push updates, pull weights; no worker waits for another unless the staleness policy says so.

    Args:
        shards: Slices of the model, each with its own owner and clock, at least 1; default one per 256 KiB,
            at most one per worker. More of them spread the load over more ports, in smaller messages.
        staleness: What is done with late updates: a policy, or several joined by `+`; default
            1/(s + 1). `constant` adds N full updates where others add their mean: it needs `rate` 1/N.
        rate: Factor on every update, above 0; default 1. Lower it when training diverges.
        push: Minibatches between two pushes, at least 1; default 1. Larger sends less.
        pull: Minibatches between two pulls, at least 1; default 1. Larger sends less, on older weights.
        prefetch: Use the answer to a pull at the next pull, without waiting for it; default false. Hides the
            round trip at the price of staleness.
        sends: `updates` (default): the changes that the worker's optimizer made. `gradients`: the shards run
            SGD, so that momentum is kept once, there.
        lr: Learning rate of the shards, with `sends=gradients` only; default 0.1.
        momentum: Momentum of the shards, with `sends=gradients` only; default 0.
        backup: Applied updates between two backups of a shard on another rank; default the number of
            workers. 0 makes none: what a dead owner held is then what a worker last pulled.
        codec: Encodes updates and weights, e.g. `error_feedback(codec=int8)`; default none. Needs float32
            parameters, and a copy of the model per worker, spread over the shards.
        record: Path to write the order of exchanges to, for a replay; default "" writes none.
        replay: Path of a recording whose order is enforced; default "" enforces none.

    Raises:
        ConfigError: An argument outside of its range, or a recording of other workers or shards.

    Example:
        `parameter_server(shards=4, staleness=softsync(c=4)+inverse)`

    Source: Dean et al. (Downpour SGD), NIPS 2012; Li et al. (parameter server), OSDI 2014.
    """

    advice = "No worker waits for stragglers: for uneven or busy machines. Shards spread load over workers."
    survives_loss = True

    def __init__(
        self,
        *,
        shards: int | None = None,
        staleness: str | Spec | tuple[Spec, ...] = "inverse(plus_one=true)",
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
        super().__init__(period=1)  # whether it is time to push or pull, the client decides
        self.num_shards = None if shards is None else whole_number(f"{self.name}: shards", shards, least=1)
        self.push = whole_number(f"{self.name}: push", push, least=1)
        self.pull = whole_number(f"{self.name}: pull", pull, least=1)
        self.prefetch, self.staleness = prefetch, staleness
        self.backup = None if backup is None else whole_number(f"{self.name}: backup", backup, least=0)
        if str(sends) not in ("updates", "gradients") or not rate > 0:
            raise ConfigError(f"sends={sends}, rate={rate}: updates or gradients, and rate > 0 expected")
        self.needs_gradients = str(sends) == "gradients"
        self._rate, self._lr, self._momentum = rate, lr, momentum
        staleness_policy.make(staleness)  # a wrong policy is refused here, before any work
        self._codec = None if codec is None else codecs.make(codec)
        self._recording = Recording(replay=replay, record=record)
        self._last_stats: dict[str, Any] = {}

    def attach(self, replica: Replica, comm: Communicator) -> None:
        """Every rank hosts its share of the shards, filled from its own copy of the equal parameters."""
        super().attach(replica, comm)
        flats = replica.parameters
        num_shards = self.num_shards or default_shards(sum(flat.nbytes for flat in flats), comm.size)
        slices = Slices(flats, num_shards, what="shard")
        encoding.check(self._codec, flats)
        self._recording.check(num_shards, comm.size)
        view = RankView()
        self.client = ShardClient(
            comm,
            flats,
            slices,
            channel=self.channel,
            view=view,
            push_every=self.push,
            pull_every=self.pull,
            prefetch=self.prefetch,
            sends_gradients=self.needs_gradients,
            codec=self._codec,
        )
        self.host = ShardHost(
            comm,
            channel=self.channel,
            num_shards=num_shards,
            make_shard=self._make_shard,
            initial=lambda j: slices.of(flats, j),
            remembered=self.client.remembered,
            view=view,
            backup_every=comm.size if self.backup is None else self.backup,
            recording=self._recording,
        )

    def _make_shard(self, j: int, weights: Sequence[torch.Tensor]) -> Shard:
        optimizer = ShardOptimizer(self.needs_gradients, self._rate, self._lr, self._momentum)
        policy = staleness_policy.make(self.staleness)
        return Shard(weights, policy, optimizer, self.comm.size, self.comm.deferred, self._codec, j)

    def before_update(self) -> None:
        """Keep the gradient: the pull overwrites the local step."""
        super().before_update()
        if self.needs_gradients and self.replica.has_samples:
            self.client.add_gradients(self.replica.gradients, self.replica.weight)

    def exchange(self) -> None:
        """Push and pull if it is time."""
        self.replica.adopt()
        self.client.step()

    def synchronize(self) -> None:
        """Wait until all living workers have come here; all then hold the shards' final weights."""
        self.replica.adopt()
        answers = self.client.finish()
        self._last_stats = summarize([a.tensors[-1] for a in answers], [dict(a.header) for a in answers])
        self._recording.save(self.comm.rank)

    def rest(self) -> None:
        self.client.rest()

    def consensus(self) -> list[torch.Tensor] | None:
        """The weights on the shards. Workers rest meanwhile, and go on from what they had pulled."""
        self.rest()
        self.comm.barrier().wait()
        flats = self.client.peek()
        self.comm.barrier().wait()  # no worker pushes before all have read
        return flats

    def stats(self) -> dict[str, Any]:
        """Staleness of the last pull, of all applied updates after `synchronize`, and the codec's bytes."""
        found = {"staleness": self.client.staleness, **self._last_stats}
        if self._codec is not None and self.client.pushes is not None:
            pulls = [shard.pulls for shard in self.host.shards.values() if shard.pulls is not None]
            found["codec"] = encoding.stats(self._codec, self.client.pushes, pulls)
        return found

    def state_dict(self) -> dict[str, Any]:
        """The worker's side, and the shards of this rank."""
        return {"worker": self.client.state_dict(), "shards": self.host.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.client.load_state_dict(state["worker"])
        self.host.load_state_dict(state["shards"])

    def traffic(self, model_bytes: int, size: int) -> float:
        """Δ up and W down at their intervals, and W to another rank at every backup."""
        backup_every = size if self.backup is None else self.backup
        backups = 0.0  # per minibatch
        if backup_every and size > 1:
            backups = 1 / (self.push * staleness_policy.make(self.staleness).group * backup_every)
        num_shards = self.num_shards or default_shards(model_bytes, size)
        one_way = float(model_bytes)
        if self._codec is not None and self._codec.is_sparse:
            one_way = encoding.measured_bytes(self.stats()["codec"], num_shards)
        elif self._codec is not None:
            one_way = encoding.claimed_bytes(self._codec, model_bytes, num_shards)
        progress = 16 * size * num_shards
        exchanged = one_way * (1 / self.push + 1 / self.pull)
        return exchanged + model_bytes * backups + progress * (1 / self.pull + backups)
