"""The outer step: SGD with momentum on the pseudo-gradient (block start − mean of the replicas).

    g = start − mean(W_i)      b ← momentum·b + g
    start ← start − rate·(g + momentum·b)   with Nesterov's momentum, else   start ← start − rate·b

Equivalences, each a test: rate 1 and momentum 0 is parameter averaging; BMUF-CBM is rate ς, momentum η;
BMUF-NBM is the same with Nesterov, which is DiLoCo's outer step; SlowMo at a constant inner learning rate is
CBM. `start` is what workers begin a block from; under Nesterov it is W_g − rate·momentum·b, ahead of W_g.
"""

from __future__ import annotations

import abc
from typing import Any

import torch

from paceline.codecs.reducers.flat_sums import FlatSums
from paceline.errors import ConfigError
from paceline.spec import Spec
from paceline.strategies.base.strategy import TrainingStrategy
from paceline.types import Communicator


class OuterSGD:
    """State and step of the outer optimizer on a list of flat tensors."""

    def __init__(self, start: list[torch.Tensor], *, rate: float, momentum: float, nesterov: bool) -> None:
        self.start = [t.clone() for t in start]
        self.buffer = [torch.zeros_like(t) for t in start]
        self._rate, self._momentum, self._nesterov = rate, momentum, nesterov

    def step(self, means: list[torch.Tensor]) -> None:
        """Move `start` given the replicas' means."""
        for start, buffer, mean in zip(self.start, self.buffer, means, strict=True):
            gradient = start - mean
            buffer.mul_(self._momentum).add_(gradient)
            step = gradient.add_(buffer, alpha=self._momentum) if self._nesterov else buffer
            start.sub_(step, alpha=self._rate)

    def behind(self) -> list[torch.Tensor]:
        """W_g: `start` without the look-ahead of Nesterov's momentum."""
        if not self._nesterov:
            return [t.clone() for t in self.start]
        ahead = self._rate * self._momentum
        return [t.add(b, alpha=ahead) for t, b in zip(self.start, self.buffer, strict=True)]


class OuterStrategy(TrainingStrategy):
    """Every worker trains alone for a period; then an outer optimizer moves the common start point."""

    replicas_differ = True
    ends_behind: bool = True
    """Whether the final model is W_g (BMUF) or the start of the next block (DiLoCo)."""

    def __init__(
        self,
        *,
        period: int,
        rate: float,
        momentum: float,
        nesterov: bool,
        codec: str | Spec | None = None,
    ) -> None:
        if isinstance(period, bool) or not isinstance(period, int) or period < 1:
            raise ConfigError(f"period={period!r}: a whole number of minibatches >= 1 expected")
        if not rate > 0 or not 0 <= momentum < 1:
            raise ConfigError(f"rate={rate}, momentum={momentum}: rate > 0 and 0 <= momentum < 1 expected")
        self.period, self._rate, self._momentum, self._nesterov = period, rate, momentum, nesterov
        self._sums = None if codec is None else FlatSums(codec)
        self._done = self._real = 0
        self._kept: list[torch.Tensor] | None = None

    @abc.abstractmethod
    def start_block(self) -> None:
        """The replica has just been set to the new start."""

    def attach(self, replica: Any, comm: Communicator) -> None:
        """Start from the equal parameters that all ranks hold."""
        super().attach(replica, comm)
        self.outer = OuterSGD(
            list(replica.parameters), rate=self._rate, momentum=self._momentum, nesterov=self._nesterov
        )
        if self._sums is not None:
            self._sums.attach(replica.parameters, replica.trained)

    def before_update(self) -> None:
        """A rank without data repeats a batch to keep step; what that changes is undone."""
        if not self.replica.has_samples and self._kept is None:
            self._kept = [flat.clone() for flat in self.replica.parameters]

    def after_update(self) -> None:
        """Count the minibatch; close the block when it is full."""
        if self._kept is not None:
            for flat, kept in zip(self.replica.parameters, self._kept, strict=True):
                flat.copy_(kept)
            self._kept = None
        self._done += 1
        self._real += int(self.replica.has_samples)
        if self._done >= self.period:
            self._close_block(finishing=False)

    def update_skipped(self) -> None:
        """A skipped update took its turn: all ranks close their blocks together."""
        self.after_update()

    def synchronize(self) -> None:
        """Close the last, short block; then everybody takes the final model."""
        while not self._close_block(finishing=True):
            pass
        self._set(self.outer.behind() if self.ends_behind else self.outer.start)

    def consensus(self) -> list[torch.Tensor] | None:
        """The global model as it is after the last full block (W_g, or the start of the block)."""
        return self.outer.behind() if self.ends_behind else [t.clone() for t in self.outer.start]

    def _close_block(self, *, finishing: bool) -> bool:
        """Outer step on the mean, weighted by minibatches done; returns whether all ranks are finishing."""
        self.replica.adopt()
        weight = self._real / self.period
        totals = torch.tensor([weight, float(finishing)], dtype=torch.float64)
        starts = self.outer.start
        if self._sums is None:
            means = [flat * weight for flat in self.replica.parameters]
            works = [self.comm.all_reduce(totals), *(self.comm.all_reduce(m) for m in means)]
        else:  # progress since the start is what codecs are good at, not the weights themselves
            means = [(f - s) * weight for f, s in zip(self.replica.parameters, starts, strict=True)]
            works = [self.comm.all_reduce(totals)]
            if self.comm.size > 1:
                self._sums.sum(means, self.comm)
        for work in works:
            work.wait()
        total, num_finishing = totals.tolist()
        self._done = self._real = 0
        if total > 0:
            torch._foreach_div_(means, total)
            if self._sums is not None:
                torch._foreach_add_(means, starts)
            self.outer.step(means)
            self._set(self.outer.start)
            self.start_block()
        return bool(num_finishing == self.comm.size)

    def _set(self, values: list[torch.Tensor]) -> None:
        for flat, value in zip(self.replica.parameters, values, strict=True):
            flat.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """The outer optimizer (block momentum included) and the place in the block."""
        return {
            "start": self.outer.start,
            "momentum": self.outer.buffer,
            "done": self._done,
            "real": self._real,
            "codec": [] if self._sums is None else self._sums.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue in the block."""
        saved = [*state["start"], *state["momentum"]]
        for own, value in zip([*self.outer.start, *self.outer.buffer], saved, strict=True):
            own.copy_(value)
        self._done, self._real = state["done"], state["real"]
        if self._sums is not None:
            self._sums.load_state_dict(state.get("codec", []))

    def stats(self) -> dict[str, Any]:
        """`codec`: its bytes by cause, encode seconds and extra memory on this rank."""
        return {} if self._sums is None else {"codec": self._sums.stats()}

    def traffic(self, model_bytes: int, size: int) -> float:
        """The model, as the codec encodes it, once per period."""
        if self._sums is not None and size > 1:
            return self._sums.traffic([flat.numel() for flat in self.outer.start], size) / self.period
        return model_bytes / self.period
