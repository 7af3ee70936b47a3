"""Decentralised threshold SGD: ±τ updates sent to all peers, asynchronously, without a server.

    r ← r + Δ;  where |r_i| ≥ τ send (i, sign) to all peers, r_i ← r_i − sign·τ;  W ← W + own and peers' ±τ

Δ is what the local optimizer changed in a minibatch, times `rate`. Weights move by ±τ alone, so all replicas
agree except for messages that are on their way; Σ sent + Σ r = Σ Δ. `synchronize()` waits for all messages
and adds all residuals: the replicas end equal, and nothing is lost.

Cost: N − 1 payloads per minibatch, of 4 bytes per hit or less.   [tested]
"""

from __future__ import annotations

from typing import Any

import torch

from paceline import local_work
from paceline.codecs.kernel import ledger
from paceline.codecs.kernel.payload import HEADER_BYTES
from paceline.codecs.threshold import Threshold
from paceline.errors import ConfigError
from paceline.spec import whole_number
from paceline.strategies.base.strategy import TrainingStrategy
from paceline.strategies.peers.agreement import mean_with_residuals
from paceline.strategies.peers.broadcast import PeerBroadcast
from paceline.types import Communicator, Replica

_MAX_DIRECT_WORKERS = 16


class DecentralizedThreshold(TrainingStrategy):
    """Send to all peers the elements whose accumulated update has reached ±τ.

    Args:
        tau: τ, in units of the weights; default adaptive (see `density`), and then the first value of τ. A
            smaller one sends more.
        density: Share of elements to send per minibatch, in (0, 0.5]: τ adapts to it. Default if `tau` is not
            given: 1,000 elements, but 0.001 to 0.01 of the model. More brings faster progress for more bytes.
        entropy: Code the indexes with Golomb–Rice codes; default false. Fewer bytes for more CPU time.
        rate: Factor on every update, above 0; default 1/(2N), half the step of the workers' mean: updates
            wait in residuals, and what is late overshoots at a learning rate that suits prompt ones. Raise it
            up to 1/N when training is stable, but slower than with one worker.
        dense_steps: First minibatches that sum all updates in step, as long as gradients are still
            large; default 0.
        warm_steps: First minibatches in which only `warm_workers` workers count; default 0. Try it when
            training diverges at the start.
        warm_workers: Number of workers that count in those, at least 1; default 1.
        relay: Pass messages on over a mesh of log₂N neighbours instead of sending to all peers; default
            only with more than 16 workers.

    Raises:
        ConfigError: An argument outside of its range.

    Example:
        `decentralized_threshold(density=0.01, entropy=true)`

    Source: Strom, Interspeech 2015.
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
        self._dense_steps = whole_number(f"{self.name}: dense_steps", dense_steps, least=0)
        self.takes_turns = dense_steps > 0
        self._warm_steps = whole_number(f"{self.name}: warm_steps", warm_steps, least=0)
        self._warm_workers = whole_number(f"{self.name}: warm_workers", warm_workers, least=1)
        self._codec = Threshold(tau=tau, density=density, entropy=entropy)
        self.density = density
        """Share of elements to send; None with a fixed τ, and by default until the model is known."""
        self._is_adaptive, self._entropy = tau is None and density is None, entropy
        self._rate, self._relay = rate, relay
        self._steps = 0
        self._received = 0

    def attach(self, replica: Replica, comm: Communicator) -> None:
        super().attach(replica, comm)
        self._scale = self._rate or 0.5 / comm.size
        if self._is_adaptive:
            numel = sum(flat.numel() for flat in replica.parameters)
            self.density = min(0.01, max(0.001, 1000 / numel))
            self._codec = Threshold(density=self.density, entropy=self._entropy)
        self._base = [flat.clone() for flat in replica.parameters]
        """The model that ±τ updates are applied to."""
        self._updates = [torch.zeros_like(flat, dtype=torch.float32) for flat in self._base]
        self._states: list[dict[str, Any]] = [{"residual": update.clone()} for update in self._updates]
        if comm.size > 1:
            is_relayed = comm.size > _MAX_DIRECT_WORKERS if self._relay is None else self._relay
            self._broadcast = PeerBroadcast(comm, self.channel, is_relayed=is_relayed)

    def after_update(self) -> None:
        """Send the elements that have reached ±τ; apply what peers sent."""
        self.replica.adopt()
        if self.comm.size == 1:
            return
        self._steps += 1
        self._measure_updates()
        local_work.charge_passes(self._base, 3)  # difference, factor, copy
        if self._steps <= self._dense_steps:
            self.await_turn()
            for work in [self.comm.all_reduce(update) for update in self._updates]:
                work.wait()
            torch._foreach_add_(self._base, self._updates)
        else:
            pairs = zip(self._updates, self._states, strict=True)
            payloads = [self._codec.encode(update, state) for update, state in pairs]
            if any(payload.numel() > HEADER_BYTES for payload in payloads):
                self._broadcast.send(payloads)
                self._apply(payloads)
        self._apply_received()
        torch._foreach_copy_(list(self.replica.parameters), self._base)

    def update_skipped(self) -> None:
        self.after_update()

    def synchronize(self) -> None:
        """All messages have arrived, all residuals are in the model, all replicas are equal bit for bit."""
        if self.comm.size == 1:
            return
        self._broadcast.drain()
        self._apply_received()
        torch._foreach_copy_(self._base, self._agreed())
        for state in self._states:
            state["residual"].zero_()
        torch._foreach_copy_(list(self.replica.parameters), self._base)

    def consensus(self) -> list[torch.Tensor] | None:
        """The mean of the replicas with all residuals added: the model if training stopped now."""
        return self._agreed() if self.comm.size > 1 else None

    def _measure_updates(self) -> None:
        """Store what the local optimizer changed, scaled; zero from a rank that must not change anything."""
        num_counted, scale = self.comm.size, self._scale
        if self._steps <= self._warm_steps:
            num_counted = min(self.comm.size, self._warm_workers)
            scale *= self.comm.size / num_counted
        if not self.replica.has_samples or self.comm.rank >= num_counted:
            torch._foreach_zero_(self._updates)
            return
        for update, flat, base in zip(self._updates, self.replica.parameters, self._base, strict=True):
            torch.sub(flat, base, out=update).mul_(scale)

    def _agreed(self) -> list[torch.Tensor]:
        return mean_with_residuals(self.comm, self._base, [state["residual"] for state in self._states])

    def _apply_received(self) -> None:
        if self.comm.size > 1:
            for payloads in self._broadcast.take(len(self._base)):
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
        self._apply_received()
        return {"base": self._base, "codec": self._states, "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        torch._foreach_copy_(self._base, state["base"])
        self._states, self._steps = state["codec"], state["steps"]

    def traffic(self, model_bytes: int, size: int) -> float:
        """Each payload goes to all peers; its size is measured, as the values decide it."""
        encoded = self.stats()["codec"]["encoded_bytes"]
        return (size - 1) * encoded / max(1, self._steps) if size > 1 else 0.0
