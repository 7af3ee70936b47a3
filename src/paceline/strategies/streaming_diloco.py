"""Streaming DiLoCo: the model in fragments that are synchronised in turn, overlapped with training.

Source: Douillard et al., 2025. Fragment f's mean is requested every `period` minibatches, f·period/fragments
later than fragment 0's, and applied `delay` minibatches after the request:
W_local ← mix·W_local + (1 − mix)·W_global, so mix = 0 takes the global fragment and mix = 1 ignores it.
The payload may be bfloat16: what travels is the difference to the fragment's last global value.

Cost: the model (or half of it in bfloat16) once per `period` minibatches, in `fragments` parts.   [tested]
"""

from __future__ import annotations

from typing import Any

import torch

from paceline.errors import ConfigError
from paceline.spec import Spec
from paceline.strategies.outer.optimizer import OuterSGD
from paceline.strategies.server.slices import Slices
from paceline.strategies.strategy import TrainingStrategy
from paceline.types import Communicator, Work

_PAYLOADS = {"full": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class StreamingDiLoCo(TrainingStrategy):
    """DiLoCo without the pause: one fragment at a time travels while training goes on."""

    advice = (
        "DiLoCo whose traffic is spread evenly and hidden behind compute; for links that DiLoCo saturates."
    )
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
    ) -> None:
        for name, value, least in (("period", period, 1), ("fragments", fragments, 1), ("delay", delay, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name}={value!r}: a whole number >= {least} expected")
        if fragments > period or delay >= period:
            raise ConfigError(f"fragments={fragments} <= period={period} > delay={delay} expected")
        if not 0 <= mix < 1 or str(payload) not in _PAYLOADS:
            raise ConfigError(
                f"mix={mix} in [0, 1), payload={payload} one of {', '.join(_PAYLOADS)} expected"
            )
        self.period, self.fragments, self.delay, self.mix = period, fragments, delay, mix
        self._rate, self._momentum, self._payload = rate, momentum, _PAYLOADS[str(payload)]
        self._steps = 0
        self._flying: dict[int, tuple[int, list[torch.Tensor], list[Work]]] = {}

    def attach(self, replica: Any, comm: Communicator) -> None:
        """Cut the flat parameters into fragments, each with its own outer optimizer."""
        super().attach(replica, comm)
        self._slices = Slices(replica.parameters, self.fragments)
        self._outer = [
            OuterSGD(self._local(f), rate=self._rate, momentum=self._momentum, nesterov=True)
            for f in range(self.fragments)
        ]

    def after_update(self) -> None:
        """Apply what has waited long enough; request the fragment whose turn it is."""
        self.replica.adopt()
        self._steps += 1
        for f in range(self.fragments):
            if (self._steps - f * self.period // self.fragments) % self.period == 0:
                self._request(f)
        for f in [f for f, (due, _, _) in self._flying.items() if due <= self._steps]:
            self._apply(f)

    def update_skipped(self) -> None:
        """A skipped update takes its turn."""
        self.after_update()

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
        self._flying[f] = (self._steps + self.delay, sums, [self.comm.all_reduce(s) for s in sums])

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
        return {"outer": outer, "steps": self._steps, "flying": flying}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue."""
        for outer, (start, buffer) in zip(self._outer, state["outer"], strict=True):
            outer.start, outer.buffer = [t.clone() for t in start], [t.clone() for t in buffer]
        self._steps = state["steps"]
        self._flying = {int(f): (due, list(sums), []) for f, (due, sums) in state["flying"].items()}

    def traffic(self, model_bytes: int, size: int) -> float:
        """Every fragment once per period; half of it when float32 travels in 16 bits."""
        return model_bytes / self.period * (0.5 if self._payload else 1.0)
