"""Gossip: random pairs of workers average their models; there is no server and no global barrier.

Every `period` minibatches
    synchronous: all ranks draw the same random pairing and each pair averages (mixing is doubly stochastic)
    asynchronous: a worker averages with a random peer whenever it is ready: (x, y) → both (x + y)/2

Every exchange keeps the sum over workers. `stats()` has the consensus distance √mean‖W_i − mean‖².

Cost: 2 + 4/period times the model per minibatch, answers included; 2/period of them go to and from a peer,
the others stay on this rank.   [tested]
"""

from __future__ import annotations

from typing import Any

import torch

from paceline import local_work
from paceline.errors import ConfigError, PeerLost
from paceline.spec import Spec
from paceline.strategies.base.periodic import PeriodicStrategy
from paceline.types import Communicator, Message, Rank, Replica

_FACTORS = {"add": (1.0, 1.0), "mix": (0.5, 0.5), "set": (0.0, 1.0), "read": (1.0, 0.0)}
"""What a message does to the shared model: operation → (factor of the model, factor of the message)."""


class Gossip(PeriodicStrategy):
    """Average the models of random pairs every `period` minibatches.

    Every rank has a shared model that its message service alone changes: a peer can average with it while
    the worker trains. The worker adds its updates to it by a message to its own rank.

    Args:
        period: Minibatches between two averages, at least 1; default 1. A larger one sends less; replicas
            then drift further apart (see `consensus_distance` in `job.stats()`).
        mode: `asynchronous` (default): no worker waits for another. `synchronous`: all ranks meet at
            barriers and average in disjoint pairs: repeatable, but as slow as the slowest worker.
        seed: Seed of the random pairing, a whole number; default 0. The same on all ranks.

    Raises:
        ConfigError: A period below 1, or a mode that does not exist.

    Example:
        `gossip(period=4, mode=asynchronous)`

    Source: Lian et al. (AD-PSGD), ICML 2018; NoLoCo, 2025.
    """

    advice = "No hot spot, no global barrier: for many workers on uneven links; converges to consensus."
    survives_loss = True

    def __init__(self, *, period: int = 1, mode: str | Spec = "asynchronous", seed: int = 0) -> None:
        super().__init__(period=period)
        if str(mode) not in ("synchronous", "asynchronous"):
            raise ConfigError(f"mode={mode}: synchronous or asynchronous expected")
        self.mode = str(mode)
        self.takes_turns = self.mode == "synchronous"
        self._seed = seed
        self._steps = 0
        """Minibatches since the start of training."""
        self._lost: set[Rank] = set()
        self._distance = 0.0

    def attach(self, replica: Replica, comm: Communicator) -> None:
        super().attach(replica, comm)
        self._shared = [flat.clone() for flat in replica.parameters]
        """The model that peers average with; only the message service changes it."""
        self._base = [flat.clone() for flat in replica.parameters]
        """The shared model when this worker last saw it: updates are counted from there."""
        comm.serve(self.channel, self._handle)
        comm.on_lost(self._lost.add)

    def minibatch_done(self) -> None:
        """Add this worker's update to its shared model, and take what peers have changed in it."""
        self.replica.adopt()
        self._steps += 1
        if self.comm.size > 1:
            pairs = zip(self.replica.parameters, self._base, strict=True)
            local_work.charge_passes(self._base, 1)
            self._take(self._call(self.comm.rank, "add", [flat - base for flat, base in pairs]))

    def exchange(self) -> None:
        """Average with a peer."""
        if self.comm.size == 1:
            return
        if self.mode == "synchronous":
            self.await_turn()
            self._mix_in_step(self._partner())
        else:
            self._mix(self._random_peer())

    def synchronize(self) -> None:
        """All replicas become their mean."""
        if self.comm.size > 1:
            self.await_turn(is_finishing=True)
            self.comm.drain()
            self._take(self._call(self.comm.rank, "set", self._mean()))

    def consensus(self) -> list[torch.Tensor] | None:
        """The mean of all replicas."""
        return self._mean() if self.comm.size > 1 else None

    def stats(self) -> dict[str, Any]:
        """Distance of the replicas from their mean when it was last formed."""
        return {"consensus_distance": self._distance}

    def _handle(self, src: Rank, message: Message) -> Message:
        """On the message service: the only place that changes the shared model."""
        own_factor, given_factor = _FACTORS[str(message.header["op"])]
        for own, given in zip(self._shared, message.tensors, strict=True):
            own.mul_(own_factor).add_(given, alpha=given_factor)
            local_work.charge_passes([own], 2)
        return Message({}, self._shared)

    def _call(self, peer: Rank, op: str, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Apply `op` to the shared model of `peer`, and return it."""
        return list(self.comm.call(peer, self.channel, Message({"op": op}, tensors)).wait().tensors)

    def _mix(self, peer: Rank) -> None:
        """Replace the peer's model by the mean of both, and take that mean."""
        sent = [base.clone() for base in self._base]
        self._move(sent, self._call_or_lose(peer, "mix", sent))

    def _mix_in_step(self, peer: Rank) -> None:
        """Both members of the pair read each other's model, between barriers, and move to the mean."""
        sent = [base.clone() for base in self._base]
        self.comm.barrier().wait()
        theirs = self._call_or_lose(peer, "read", sent)
        self.comm.barrier().wait()
        self._move(sent, [(their + own) * 0.5 for their, own in zip(theirs, sent, strict=True)])

    def _call_or_lose(self, peer: Rank, op: str, sent: list[torch.Tensor]) -> list[torch.Tensor]:
        """As `_call`; when the peer has died, `sent`: the mean with oneself changes nothing."""
        try:
            return self._call(peer, op, sent)
        except PeerLost:
            self._lost.add(peer)
            return sent

    def _move(self, sent: list[torch.Tensor], mean: list[torch.Tensor]) -> None:
        """Add mean − sent to the own shared model, which peers may have changed meanwhile."""
        local_work.charge_passes(self._base, 2)  # this difference, and the copy that was sent
        correction = [there - here for there, here in zip(mean, sent, strict=True)]
        self._take(self._call(self.comm.rank, "add", correction))

    def _partner(self) -> Rank:
        """The other member of this rank's pair in a pairing that all ranks draw alike."""
        order = self._shuffled_ranks(salt=0)
        place = order.index(self.comm.rank) ^ 1
        return order[place] if place < len(order) else self.comm.rank  # of an odd number, one stays alone

    def _random_peer(self) -> Rank:
        """A living peer that this rank draws by itself; the rank itself when it is the last one."""
        order = self._shuffled_ranks(salt=self.comm.rank + 1)
        return next((r for r in order if r != self.comm.rank and r not in self._lost), self.comm.rank)

    def _shuffled_ranks(self, *, salt: int) -> list[Rank]:
        generator = torch.Generator().manual_seed(self._seed * 7_368_787 + self._steps * 100_003 + salt)
        order: list[Rank] = torch.randperm(self.comm.size, generator=generator).tolist()
        return order

    def _take(self, tensors: list[torch.Tensor]) -> None:
        local_work.charge_passes(self._base, 2)
        torch._foreach_copy_(list(self.replica.parameters), tensors)
        torch._foreach_copy_(self._base, tensors)

    def _mean(self) -> list[torch.Tensor]:
        own = self._call(self.comm.rank, "read", self._base)
        count = torch.ones(1, dtype=torch.float64)
        means = [t.clone() for t in own]
        for work in [self.comm.all_reduce(count), *(self.comm.all_reduce(mean) for mean in means)]:
            work.wait()
        torch._foreach_div_(means, count.item())
        gaps = [(t - mean).double().square().sum() for t, mean in zip(own, means, strict=True)]
        square = torch.stack(gaps).sum().reshape(1)
        self.comm.all_reduce(square).wait()
        self._distance = (square.item() / count.item()) ** 0.5
        return means

    def state_dict(self) -> dict[str, Any]:
        """The shared model, what this worker knows of it, and the number of minibatches."""
        return {"shared": self._shared, "base": self._base, "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        torch._foreach_copy_([*self._shared, *self._base], [*state["shared"], *state["base"]])
        self._steps = state["steps"]
        self._done = self._steps % self.period

    def traffic(self, model_bytes: int, size: int) -> float:
        """Update, correction and both answers at this rank; the model and an answer at a peer."""
        return model_bytes * (2 + 4 / self.period) if size > 1 else 0.0
