"""Streaming DiLoCo: the model in fragments that are synchronised in turn, overlapped with training.

Source: Douillard et al., 2025. Fragment f's mean is requested every `period` minibatches, f·period/fragments
later than fragment 0's, and applied `delay` minibatches after the request:
W_local ← mix·W_local + (1 − mix)·W_global, so mix = 0 takes the global fragment and mix = 1 ignores it.
The payload may be bfloat16, or in any `codec`: what travels is the difference to the last global value.

Cost: the model (or half of it in bfloat16) once per `period` minibatches, in `fragments` parts.   [tested]
"""

from __future__ import annotations

from typing import Any

import torch

from paceline import codecs
from paceline.codecs.kernel import ledger
from paceline.codecs.reducers.reducer import StagedWork
from paceline.errors import ConfigError
from paceline.spec import Spec
from paceline.strategies.base.staleness_policy import whole
from paceline.strategies.base.strategy import TrainingStrategy
from paceline.strategies.outer.optimizer import OuterSGD
from paceline.strategies.server.slices import Slices
from paceline.types import Communicator, Work

_PAYLOADS = {"full": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class StreamingDiLoCo(TrainingStrategy):
    """DiLoCo without the pause: one fragment at a time travels while training goes on."""

    advice = "DiLoCo with its traffic spread evenly behind compute; for links that DiLoCo saturates."
    replicas_differ = True

    def __init__(
        self,
        *,
        period: int = 100,
        fragments: int = 4,
        delay: int = 1,
        mix: float = 0.0,
        rate: float = 0.7,
        momentum: float = 0.9,
        payload: str | Spec = "full",
        codec: str | Spec | None = None,
    ) -> None:
        self.period, self.fragments = whole("period", period, least=1), whole("fragments", fragments, least=1)
        self.delay, self.mix = whole("delay", delay, least=0), mix
        if fragments > period or delay >= period:
            raise ConfigError(f"fragments={fragments} <= period={period} > delay={delay} expected")
        if not 0 <= mix < 1 or str(payload) not in _PAYLOADS:
            raise ConfigError(f"mix={mix} in [0, 1), payload={payload} of {', '.join(_PAYLOADS)} expected")
        self._rate, self._momentum, self._payload = rate, momentum, _PAYLOADS[str(payload)]
        if codec is not None and self._payload is not None:
            raise ConfigError(f"codec={codec} and payload={payload}: only one of them")
        self._reducer = None if codec is None else codecs.make_reducer(codec)
        self._states: list[list[dict[str, Any]]] = []
        self._steps = 0
        self._flying: dict[int, tuple[int, list[torch.Tensor], list[Work | StagedWork]]] = {}

    def attach(self, replica: Any, comm: Communicator) -> None:
        """Cut the flat parameters into fragments, each with its own outer optimizer."""
        super().attach(replica, comm)
        self._slices = Slices(replica.parameters, self.fragments)
        parts = [self._local(f) for f in range(self.fragments)]
        self._states = [[{} for _ in part] for part in parts]
        momentum: dict[str, Any] = {"momentum": self._momentum, "nesterov": True}
        self._outer = [OuterSGD(part, rate=self._rate, **momentum) for part in parts]

    def after_update(self) -> None:
        """Apply what has waited long enough; request the fragment whose turn it is."""
        self.replica.adopt()
        self._steps += 1
        for f in range(self.fragments):
            if (self._steps - f * self.period // self.fragments) % self.period == 0:
                self._request(f)
        for f in [f for f, (due, *_) in self._flying.items() if due <= self._steps]:
            self._apply(f)

    update_skipped = after_update

    def synchronize(self) -> None:
        """Finish what travels, then one last outer step on every fragment; all take the global model."""
        for f in list(self._flying):
            self._apply(f)
        for f in range(self.fragments):
            self._request(f)
            self._apply(f, mix=0.0)

    def consensus(self) -> list[torch.Tensor] | None:
        """The global model: every fragment as of its last outer step."""
        flats = [flat.clone() for flat in self.replica.parameters]
        for f in range(self.fragments):
            for view, value in zip(self._slices.of(flats, f), self._outer[f].start, strict=True):
                view.copy_(value)
        return flats

    def _local(self, fragment: int) -> list[torch.Tensor]:
        return self._slices.of(self.replica.parameters, fragment)

    def _request(self, f: int) -> None:
        pairs = zip(self._local(f), self._outer[f].start, strict=True)
        sums = [((local - start) / self.comm.size).to(self._payload or start.dtype) for local, start in pairs]
        self._flying[f] = (self._steps + self.delay, sums, list(map(self._sum, sums, self._states[f])))

    def _sum(self, flat: torch.Tensor, state: dict[str, Any]) -> Work | StagedWork:
        if self._reducer is None:
            return self.comm.all_reduce(flat)
        return self._reducer.start(flat, [], self.comm, state)  # its second exchange starts when it is due

    def _apply(self, f: int, *, mix: float | None = None) -> None:
        _, sums, works = self._flying.pop(f)
        for work in works:
            work.wait()
        outer, mix = self._outer[f], self.mix if mix is None else mix
        outer.step([start + s.to(start.dtype) for start, s in zip(outer.start, sums, strict=True)])
        for local, value in zip(self._local(f), outer.start, strict=True):
            local.mul_(mix).add_(value, alpha=1 - mix) if mix else local.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """Outer optimizers, the clock, and sums that have arrived but are not yet due."""
        for _, _, works in self._flying.values():
            for work in works:
                work.wait()
        flying = {str(f): [due, sums] for f, (due, sums, _) in self._flying.items()}
        outer = [[o.start, o.buffer] for o in self._outer]
        return {"outer": outer, "steps": self._steps, "flying": flying, "codec": self._states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue."""
        for outer, saved in zip(self._outer, state["outer"], strict=True):
            outer.start, outer.buffer = ([t.clone() for t in part] for part in saved)
        self._steps, self._states = state["steps"], state["codec"]
        self._flying = {int(f): (due, list(sums), []) for f, (due, sums) in state["flying"].items()}

    def stats(self) -> dict[str, Any]:
        """`codec`: its bytes by cause on this rank."""
        stats = [self._reducer.stats(s) for states in self._states for s in states] if self._reducer else []
        return {"codec": ledger.total(stats)} if stats else {}

    def traffic(self, model_bytes: int, size: int) -> float:
        """Every fragment once per period; half of it when float32 travels in 16 bits."""
        if self._reducer is not None and size > 1:
            pieces = [t.numel() for outer in self._outer for t in outer.start]
            return sum(self._reducer.traffic(n, [], size) for n in pieces) / self.period
        return model_bytes / self.period * (0.5 if self._payload else 1.0)
