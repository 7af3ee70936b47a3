"""The base of bmuf, diloco and slowmo: blocks of local training, then one outer step."""

from __future__ import annotations

import abc
from typing import Any, ClassVar

import torch

from paceline.errors import ConfigError
from paceline.spec import Spec
from paceline.strategies.base.periodic import AveragingStrategy
from paceline.strategies.outer.optimizer import OuterSGD
from paceline.types import Communicator, Replica


class OuterStrategy(AveragingStrategy):
    """Every worker trains alone for a block; then an outer optimizer moves the common start of blocks.

    Args:
        period: Minibatches of a block, at least 1.
        rate: Outer learning rate, above 0.
        momentum: Outer momentum, from 0 to below 1.
        nesterov: Nesterov's momentum instead of the classical one.
        codec: Encodes a worker's progress in a block; None sends it uncompressed.
    """

    ends_with_global_model: ClassVar[bool]
    """Whether the final model is the global model W_g (BMUF) or the start of the next block (DiLoCo)."""

    def __init__(
        self,
        *,
        period: int,
        rate: float,
        momentum: float,
        nesterov: bool,
        codec: str | Spec | None,
    ) -> None:
        super().__init__(period=period, codec=codec)
        if not rate > 0 or not 0 <= momentum < 1:
            raise ConfigError(f"rate={rate}, momentum={momentum}: rate > 0 and 0 <= momentum < 1 expected")
        self._rate, self._momentum, self._nesterov = rate, momentum, nesterov

    @abc.abstractmethod
    def start_block(self) -> None:
        """The replica has just been set to the start of a new block."""

    def attach(self, replica: Replica, comm: Communicator) -> None:
        """Start from the equal parameters that all ranks hold."""
        super().attach(replica, comm)
        self.outer = OuterSGD(
            replica.parameters, rate=self._rate, momentum=self._momentum, nesterov=self._nesterov
        )
        if self._sums is not None:
            self._sums.attach(replica.parameters, replica.trained)

    def synchronize(self) -> None:
        """Close the last, short block; then all ranks take the final model."""
        super().synchronize()
        self._set_replica(self._model())

    def consensus(self) -> list[torch.Tensor] | None:
        """The global model after the last full block (W_g, or the start of the block)."""
        return self._model()

    def close_round(self, *, finishing: bool) -> bool:
        """Outer step on the mean of the replicas, weighted by the minibatches that they did."""
        self.replica.adopt()
        weight = self._real / self.period
        totals = torch.tensor([weight, float(finishing)], dtype=torch.float64)
        works = [self.comm.all_reduce(totals)]
        starts = self.outer.start
        if self._sums is None:
            means = [flat * weight for flat in self.replica.parameters]
            works += [self.comm.all_reduce(mean) for mean in means]
        else:  # codecs suit progress since the start, not the weights themselves
            pairs = zip(self.replica.parameters, starts, strict=True)
            means = [(flat - start) * weight for flat, start in pairs]
            if self.comm.size > 1:
                self._sums.sum(means, self.comm)
        for work in works:
            work.wait()
        total, num_finishing = totals.tolist()
        if total > 0:
            torch._foreach_div_(means, total)
            if self._sums is not None:
                torch._foreach_add_(means, starts)
            self.outer.step(means)
            self._set_replica(self.outer.start)
            self.start_block()
        return bool(num_finishing == self.comm.size)

    def _model(self) -> list[torch.Tensor]:
        if self.ends_with_global_model:
            return self.outer.global_model()
        return [start.clone() for start in self.outer.start]

    def _set_replica(self, values: list[torch.Tensor]) -> None:
        torch._foreach_copy_(list(self.replica.parameters), values)

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
        saved = [*state["start"], *state["momentum"]]
        for own, value in zip([*self.outer.start, *self.outer.buffer], saved, strict=True):
            own.copy_(value)
        self._done, self._real = state["done"], state["real"]
        if self._sums is not None:
            self._sums.load_state_dict(state.get("codec", []))

    def traffic(self, model_bytes: int, size: int) -> float:
        """The model, as the codec encodes it, once per period."""
        if self._sums is not None and size > 1:
            return self._sums.traffic([flat.numel() for flat in self.outer.start], size) / self.period
        return model_bytes / self.period
