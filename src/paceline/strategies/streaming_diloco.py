"""Streaming DiLoCo: the model in fragments that are synchronised in turn, overlapped with training.

Fragment f's mean is requested every `period` minibatches, f·period/fragments later than fragment 0's, and
applied `delay` minibatches after the request: W_local ← mix·W_local + (1 − mix)·W_global. What travels is the
difference to the last global value.

Cost: the model (or half of it in bfloat16) once per `period` minibatches, in `fragments` parts.   [tested]
"""

from __future__ import annotations

from typing import Any

import torch

from paceline import codecs
from paceline.codecs.kernel import ledger
from paceline.errors import ConfigError
from paceline.spec import Spec, whole_number
from paceline.strategies.base.periodic import check_period, wanted_period
from paceline.strategies.base.slices import Slices
from paceline.strategies.base.strategy import TrainingStrategy
from paceline.strategies.outer import optimizer_state
from paceline.strategies.outer.fragment import FragmentInFlight, take
from paceline.strategies.outer.optimizer import OuterArguments, OuterSGD
from paceline.types import Communicator, Replica, Work

DEFAULT_PERIOD = 100
_PAYLOADS = {"full": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class StreamingDiLoCo(TrainingStrategy):
    """DiLoCo without the pause: one fragment at a time travels while training goes on.

    Args:
        period: Minibatches between two outer steps of a fragment, at least `fragments`; default 100; if a
            thirtieth of the run, or four times the samples of a worker's minibatch, is less, then that.
        fragments: Number of parts into which the model is cut, at least 1; default 4. More of them spread
            the traffic more evenly, in smaller messages.
        delay: Minibatches between the request of a mean and its use, from 0 to below `period`; default 1.
            Raise it until the transfer of a fragment is hidden behind that many minibatches.
        mix: Share of the local value that is kept when a fragment is applied, from 0 to below 1; default 0
            takes the global value. Try 0.5 with a long delay: it keeps what was trained meanwhile.
        rate: Outer learning rate, above 0; default 0.7 if the workers' optimizer is of Adam's kind, else
            1 − momentum.
        momentum: Outer Nesterov momentum, from 0 to below 1; default 0.9 if the workers' optimizer is of
            Adam's kind, else 0.5: on top of SGD, 0.7 and 0.9 diverge.
        payload: `full` (default: the parameters' dtype), or `bfloat16` or `float16` for half the bytes.
        codec: Encodes the progress, e.g. `error_feedback(codec=int4)`; default none. Excludes `payload`.

    Raises:
        ConfigError: An argument outside of its range, both `codec` and `payload`, or too many fragments.

    Example:
        `streaming_diloco(period=100, fragments=8, delay=5, payload=bfloat16)`

    Source: Douillard et al., Streaming DiLoCo, 2025.
    """

    advice = "DiLoCo with its traffic spread evenly behind compute; for links that DiLoCo saturates."
    replicas_differ = True
    takes_turns = True

    def __init__(
        self,
        *,
        period: int | None = None,
        fragments: int = 4,
        delay: int = 1,
        mix: float = 0.0,
        rate: float | None = None,
        momentum: float | None = None,
        payload: str | Spec = "full",
        codec: str | Spec | None = None,
    ) -> None:
        self._is_period_given = period is not None
        period = DEFAULT_PERIOD if period is None else period
        self.period = whole_number(f"{self.name}: period", period, least=1)
        self.fragments = whole_number(f"{self.name}: fragments", fragments, least=1)
        self.delay = whole_number(f"{self.name}: delay", delay, least=0)
        if fragments > period or delay >= period:
            raise ConfigError(f"fragments={fragments} <= period={period} > delay={delay} expected")
        if not 0 <= mix < 1 or str(payload) not in _PAYLOADS:
            raise ConfigError(f"mix={mix} in [0, 1), payload={payload} of {', '.join(_PAYLOADS)} expected")
        self.mix = mix
        self._arguments = OuterArguments(rate, momentum)
        self._payload = _PAYLOADS[str(payload)]
        if codec is not None and self._payload is not None:
            raise ConfigError(f"codec={codec} and payload={payload}: only one of them")
        self._reducer = None if codec is None else codecs.make_reducer(codec)
        self._codec_states: list[list[dict[str, Any]]] = []
        self._steps = 0
        self._transfers: dict[int, FragmentInFlight] = {}

    def attach(self, replica: Replica, comm: Communicator) -> None:
        """Cut the flat parameters into fragments, each with its own outer optimizer."""
        super().attach(replica, comm)
        self._slices = Slices(replica.parameters, self.fragments, what="fragment")
        parts = [self._local(f) for f in range(self.fragments)]
        self._codec_states = [
            [{"tensor": i * len(parts) + f} for i in range(len(part))] for f, part in enumerate(parts)
        ]
        rate, momentum = self._arguments.values(is_adaptive=False)
        self._outer = [OuterSGD(part, rate=rate, momentum=momentum, nesterov=True) for part in parts]

    def fit(self, num_steps: int, num_workers: int, batch_size: int = 0) -> str:
        if not self._is_period_given:
            shortest = max(self.fragments, self.delay + 1)
            self.period = max(shortest, min(DEFAULT_PERIOD, wanted_period(num_steps, batch_size)))
        return check_period(self.period, num_steps, num_workers, batch_size)

    def after_update(self) -> None:
        """Request the fragment whose turn it is; apply those that are due."""
        self.replica.adopt()
        self._steps += 1
        every, count = self.period, self.fragments
        asked = [f for f in range(count) if (self._steps - f * every // count) % every == 0]
        if asked or (self._reducer is not None and self._transfers):  # a codec's second exchange
            self.await_turn()
        for f in asked:
            self._request(f)
        for f in [f for f, transfer in self._transfers.items() if transfer.due <= self._steps]:
            self._apply(f, mix=self.mix)

    def update_skipped(self) -> None:
        self.after_update()

    def synchronize(self) -> None:
        """Finish what travels, then one last outer step on every fragment; all take the global model."""
        self.await_turn(is_finishing=True)
        for f in list(self._transfers):
            self._apply(f, mix=self.mix)
        for f in range(self.fragments):
            self._request(f)
            self._apply(f, mix=0.0)

    def consensus(self) -> list[torch.Tensor] | None:
        """The global model: every fragment as of its last outer step."""
        flats = [flat.clone() for flat in self.replica.parameters]
        for f in range(self.fragments):
            torch._foreach_copy_(self._slices.of(flats, f), self._outer[f].start)
        return flats

    def _local(self, f: int) -> list[torch.Tensor]:  # views of this replica's parameters
        return self._slices.of(self.replica.parameters, f)

    def _request(self, f: int) -> None:
        pairs = zip(self._local(f), self._outer[f].start, strict=True)
        shares = [(local - start) / self.comm.size for local, start in pairs]
        progress = [share.to(self._payload or share.dtype) for share in shares]
        works = [self._sum(flat, state) for flat, state in zip(progress, self._codec_states[f], strict=True)]
        progress.append(torch.tensor([float(optimizer_state.is_adaptive(self.replica))]))
        works.append(self.comm.all_reduce(progress[-1]))
        self._transfers[f] = FragmentInFlight(self._steps + self.delay, progress, works)

    def _sum(self, flat: torch.Tensor, state: dict[str, Any]) -> Work:
        if self._reducer is None:
            return self.comm.all_reduce(flat)
        return self._reducer.start(flat, [], self.comm, state)  # its second exchange starts when it is due

    def _apply(self, f: int, *, mix: float) -> None:
        outer, (progress, is_adaptive) = self._outer[f], self._transfers.pop(f).arrived()
        outer.rate, outer.momentum = self._arguments.values(is_adaptive=is_adaptive)
        pairs = zip(outer.start, progress, strict=True)
        outer.step([start + part.to(start.dtype) for start, part in pairs])
        take(self._local(f), outer.start, mix=mix)

    def state_dict(self) -> dict[str, Any]:
        """Outer optimizers, the number of minibatches, and means that have arrived but are not yet due."""
        for transfer in self._transfers.values():
            transfer.wait()
        return {
            "outer": [[outer.start, outer.buffer] for outer in self._outer],
            "steps": self._steps,
            "flying": {str(f): [transfer.due, transfer.progress] for f, transfer in self._transfers.items()},
            "codec": self._codec_states,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for outer, (start, buffer) in zip(self._outer, state["outer"], strict=True):
            outer.start = [t.clone() for t in start]
            outer.buffer = [t.clone() for t in buffer]
        self._steps, self._codec_states = state["steps"], state["codec"]
        flying = state["flying"].items()
        self._transfers = {int(f): FragmentInFlight(due, list(sent), []) for f, (due, sent) in flying}

    def stats(self) -> dict[str, Any]:
        """`codec`: its bytes by cause on this rank."""
        if self._reducer is None:
            return {}
        states = [state for fragment in self._codec_states for state in fragment]
        return {"codec": ledger.total(self._reducer.stats(state) for state in states)}

    def traffic(self, model_bytes: int, size: int) -> float:
        """Every fragment once per period; half of it when float32 travels in 16 bits."""
        if self._reducer is not None and size > 1:
            numels = [t.numel() for outer in self._outer for t in outer.start]
            return sum(self._reducer.traffic(numel, [], size) for numel in numels) / self.period
        return model_bytes / self.period * (0.5 if self._payload else 1.0)
