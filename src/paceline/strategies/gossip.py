"""Gossip: random pairs of workers average their models; there is no server and no global barrier.

Source: Lian et al. (AD-PSGD), ICML 2018; NoLoCo, 2025. Every `period` minibatches
synchronous: all ranks draw the same random pairing and each pair averages (mixing is doubly stochastic);
asynchronous: a worker averages with a random peer whenever it is ready: (x, y) → both (x + y)/2.
The sum over workers is kept by every exchange. `stats()` has the consensus distance √mean‖W_i − mean‖².

Cost per minibatch: the model 4 times at home (free), and twice per period to and from a peer.   [tested]
"""

from __future__ import annotations

from typing import Any

import torch

from paceline.errors import ConfigError, PeerLost
from paceline.spec import Spec
from paceline.strategies.base.strategy import TrainingStrategy
from paceline.types import Communicator, Message, Rank

_CHANNEL = "gossip"


class Gossip(TrainingStrategy):
    """Random-pair averaging."""

    advice = "No hot spot and no barrier over all: for many workers on uneven links; converges to consensus."
    replicas_differ = True
    survives_loss = True

    def __init__(self, *, period: int = 1, mode: str | Spec = "asynchronous", seed: int = 0) -> None:
        if isinstance(period, bool) or not isinstance(period, int) or period < 1:
            raise ConfigError(f"period={period!r}: a whole number of minibatches >= 1 expected")
        if str(mode) not in ("synchronous", "asynchronous"):
            raise ConfigError(f"mode={mode}: synchronous or asynchronous expected")
        self.period, self.mode, self._seed = period, str(mode), seed
        self._steps = 0
        self._lost: set[Rank] = set()
        self._distance = 0.0
        self._kept: list[torch.Tensor] | None = None

    def attach(self, replica: Any, comm: Communicator) -> None:
        """The model that peers average with belongs to the message service, which changes it alone."""
        super().attach(replica, comm)
        self._shared = [flat.clone() for flat in replica.parameters]
        self._base = [flat.clone() for flat in replica.parameters]
        comm.serve(_CHANNEL, self._handle)
        comm.on_lost(self._lost.add)

    def before_update(self) -> None:
        """What a repeated batch changes is undone."""
        if not self.replica.has_samples:
            self._kept = [flat.clone() for flat in self.replica.parameters]

    def after_update(self) -> None:
        """Add the update to the shared model; average with a peer when it is time."""
        self.replica.adopt()
        flats = self.replica.parameters
        if self._kept is not None:
            torch._foreach_copy_(list(flats), self._kept)
            self._kept = None
        self._steps += 1
        if self.comm.size == 1:
            return
        self._take(self._ask(self.comm.rank, "add", [f - b for f, b in zip(flats, self._base, strict=True)]))
        if self._steps % self.period == 0:
            self._mix(self._peer())

    update_skipped = after_update

    def synchronize(self) -> None:
        """All replicas become their mean."""
        if self.comm.size > 1:
            self.comm.drain()
            self._take(self._ask(self.comm.rank, "set", self._mean()))

    def consensus(self) -> list[torch.Tensor] | None:
        """The mean of all replicas."""
        return self._mean() if self.comm.size > 1 else None

    def stats(self) -> dict[str, Any]:
        """Distance of the replicas from their mean when it was last formed."""
        return {"consensus_distance": self._distance}

    def _handle(self, src: Rank, message: Message) -> Message:
        """The service: the only place that writes the shared model."""
        op = message.header["op"]
        for own, given in zip(self._shared, message.tensors, strict=True):
            weight = {"add": (1.0, 1.0), "mix": (0.5, 0.5), "set": (0.0, 1.0), "read": (1.0, 0.0)}[str(op)]
            own.mul_(weight[0]).add_(given, alpha=weight[1])
        return Message({}, self._shared)

    def _ask(self, peer: Rank, op: str, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return list(self.comm.call(peer, _CHANNEL, Message({"op": op}, tensors)).wait().tensors)

    def _mix(self, peer: Rank) -> None:
        sent = [b.clone() for b in self._base]
        if self.mode == "synchronous":  # both members of the pair call each other with what they had before
            self.comm.barrier().wait()
        try:
            theirs = self._ask(peer, "read" if self.mode == "synchronous" else "mix", sent)
        except PeerLost:
            self._lost.add(peer)
            theirs = sent
        if self.mode == "synchronous":
            self.comm.barrier().wait()
            theirs = [(t + s) * 0.5 for t, s in zip(theirs, sent, strict=True)]
        half = [t - s for t, s in zip(theirs, sent, strict=True)]
        self._take(self._ask(self.comm.rank, "add", half))

    def _peer(self) -> Rank:
        salt = 0 if self.mode == "synchronous" else self.comm.rank + 1
        generator = torch.Generator().manual_seed(self._seed * 7_368_787 + self._steps * 100_003 + salt)
        order = torch.randperm(self.comm.size, generator=generator).tolist()
        if self.mode == "synchronous":
            place = order.index(self.comm.rank) ^ 1
            return order[place] if place < len(order) else self.comm.rank  # the odd one out: itself
        return next((r for r in order if r != self.comm.rank and r not in self._lost), self.comm.rank)

    def _take(self, tensors: list[torch.Tensor]) -> None:
        torch._foreach_copy_(list(self.replica.parameters), tensors)
        torch._foreach_copy_(self._base, tensors)

    def _mean(self) -> list[torch.Tensor]:
        own = self._ask(self.comm.rank, "read", self._base)
        count = torch.ones(1, dtype=torch.float64)
        means = [t.clone() for t in own]
        for work in [self.comm.all_reduce(count), *(self.comm.all_reduce(m) for m in means)]:
            work.wait()
        torch._foreach_div_(means, count.item())
        gaps = [(t - m).double().square().sum() for t, m in zip(own, means, strict=True)]
        square = torch.stack(gaps).sum().reshape(1)
        self.comm.all_reduce(square).wait()
        self._distance = float((square / count).sqrt())
        return means

    def state_dict(self) -> dict[str, Any]:
        """The shared model and the clock."""
        return {"shared": self._shared, "base": self._base, "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue."""
        torch._foreach_copy_([*self._shared, *self._base], [*state["shared"], *state["base"]])
        self._steps = state["steps"]

    def traffic(self, model_bytes: int, size: int) -> float:
        """Update, correction and both answers at home; the model and an answer at a peer."""
        return model_bytes * (2 + 4 / self.period) if size > 1 else 0.0
