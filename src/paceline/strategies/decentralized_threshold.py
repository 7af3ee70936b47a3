"""Decentralised threshold SGD: ±τ updates sent to all peers, asynchronously, without a server.

    r ← r + Δ;  where |r_i| ≥ τ send (i, sign) to everybody, r_i ← r_i − sign·τ;  W ← W + own and peers' ±τ

Source: Strom, Interspeech 2015. Δ is what the local optimizer changed in a minibatch, times `rate`. Weights
move by ±τ alone, so all replicas agree up to what is on its way; Σ sent + Σ r = Σ Δ. `synchronize()` waits
for all messages and adds all residuals: the replicas end equal, nothing is lost.

Cost: N − 1 payloads per minibatch, of 4 bytes per hit or less.   [tested]
"""

from __future__ import annotations

from typing import Any

import torch

from paceline.codecs.kernel import ledger
from paceline.codecs.kernel.payload import HEADER_BYTES
from paceline.codecs.threshold import Threshold
from paceline.errors import ConfigError
from paceline.strategies.base.staleness_policy import whole
from paceline.strategies.base.strategy import TrainingStrategy
from paceline.strategies.peers.agreement import mean_with_residuals
from paceline.strategies.peers.spread import Spread
from paceline.types import Communicator

_DIRECT = 16  # workers up to which everybody sends to everybody


class DecentralizedThreshold(TrainingStrategy):
    """Send what has reached ±`tau`; or let τ adapt to a `density` of hits. `entropy` codes the indexes.

    `rate` multiplies every update; by default 1/N, so that N workers together make the step of their mean.
    `relay`: pass messages on over a mesh of log₂N neighbours; by default with more than 16 workers.
    `dense_steps`: so many first minibatches add up everything, in step, while gradients are still large.
    `warm_steps`: so many first minibatches count on the first `warm_workers` workers only.
    """

    advice = "Two to three orders of magnitude fewer bytes, no server, no waiting: for slow links."
    replicas_differ = True
    survives_loss = True

    def __init__(
        self,
        *,
        tau: float | None = None,
        density: float | None = None,
        entropy: bool = False,
        rate: float | None = None,
        dense_steps: int = 0,
        warm_steps: int = 0,
        warm_workers: int = 1,
        relay: bool | None = None,
    ) -> None:
        if rate is not None and not rate > 0:
            raise ConfigError(f"decentralized_threshold: rate={rate!r}: a number above 0 expected")
        self._dense_steps = whole("dense_steps", dense_steps, least=0)
        self._warm = whole("warm_steps", warm_steps, least=0), whole("warm_workers", warm_workers, least=1)
        self._codec = Threshold(tau=tau, density=density, entropy=entropy)
        self._rate, self._relay = rate, relay
        self._steps = self._received = 0

    def attach(self, replica: Any, comm: Communicator) -> None:
        """Listen to peers; `base` is the model that ±τ updates are applied to."""
        super().attach(replica, comm)
        self._scale = self._rate or 1 / comm.size
        self._base = [flat.clone() for flat in replica.parameters]
        self._updates = [torch.zeros_like(flat, dtype=torch.float32) for flat in self._base]
        self._states: list[dict[str, Any]] = [{"residual": u.clone()} for u in self._updates]
        if comm.size > 1:
            is_relayed = comm.size > _DIRECT if self._relay is None else self._relay
            self._spread = Spread(comm, "decentralized_threshold", is_relayed=is_relayed)

    def after_update(self) -> None:
        """Send what has reached ±τ, take in what peers sent."""
        self.replica.adopt()
        if self.comm.size == 1:
            return
        self._steps += 1
        flats = list(self.replica.parameters)
        updates, num_trained, scale = self._updates, self.comm.size, self._scale
        if self._steps <= self._warm[0]:
            num_trained = min(self.comm.size, self._warm[1])
            scale *= self.comm.size / num_trained
        for update, flat, base in zip(updates, flats, self._base, strict=True):
            torch.sub(flat, base, out=update).mul_(scale)
        if not self.replica.has_samples or self.comm.rank >= num_trained:  # must not change anything
            torch._foreach_zero_(updates)
        if self._steps <= self._dense_steps:
            for work in [self.comm.all_reduce(update) for update in updates]:
                work.wait()
            torch._foreach_add_(self._base, updates)
        else:
            own = [self._codec.encode(u, s) for u, s in zip(updates, self._states, strict=True)]
            if any(payload.numel() > HEADER_BYTES for payload in own):
                self._spread.send(own)
                self._apply(own)
        self._take_in()
        torch._foreach_copy_(flats, self._base)

    update_skipped = after_update

    def synchronize(self) -> None:
        """All messages have arrived, all residuals are in the model, all replicas are equal bit for bit."""
        if self.comm.size == 1:
            return
        self._spread.drain()
        self._take_in()
        for own, agreed in zip(self._base, self._agreed(), strict=True):
            own.copy_(agreed)
        for state in self._states:
            state["residual"].zero_()
        torch._foreach_copy_(list(self.replica.parameters), self._base)

    def consensus(self) -> list[torch.Tensor] | None:
        """The mean of the replicas with all residuals added: the model if training stopped now."""
        return self._agreed() if self.comm.size > 1 else None

    def _agreed(self) -> list[torch.Tensor]:
        return mean_with_residuals(self.comm, self._base, [state["residual"] for state in self._states])

    def _take_in(self) -> None:
        for payloads in self._spread.take(len(self._base)) if self.comm.size > 1 else []:
            self._received += 1
            self._apply(payloads)

    def _apply(self, payloads: list[torch.Tensor]) -> None:
        for payload, flat in zip(payloads, self._base, strict=True):
            self._codec.decode(payload, flat, accumulate=True)

    def stats(self) -> dict[str, Any]:
        """`codec`: bytes by cause, bits per hit; `received`: updates of peers applied."""
        return {"codec": ledger.total(map(self._codec.stats, self._states)), "received": self._received}

    def state_dict(self) -> dict[str, Any]:
        """The model that updates are applied to, residuals and τ."""
        self._take_in()
        return {"base": self._base, "codec": self._states, "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue."""
        torch._foreach_copy_(self._base, state["base"])
        self._states, self._steps = state["codec"], state["steps"]

    def traffic(self, model_bytes: int, size: int) -> float:
        """Each payload goes to all peers; its size is measured, as the values decide it."""
        made = self.stats()["codec"]["encoded_bytes"]
        return (size - 1) * made / max(1, self._steps) if size > 1 else 0.0
