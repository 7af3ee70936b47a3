"""The base of bmuf, diloco and slowmo: blocks of local training, then one outer step."""

from __future__ import annotations

import abc
from typing import Any, ClassVar

import torch

from paceline import local_work
from paceline.spec import Spec
from paceline.strategies.base.periodic import AveragingStrategy
from paceline.strategies.outer import optimizer_state
from paceline.strategies.outer.optimizer import OuterArguments, OuterSGD
from paceline.types import Communicator, Replica


class OuterStrategy(AveragingStrategy):
    """Every worker trains alone for a block; then an outer optimizer moves the common start of blocks.

    Args:
        period: Minibatches of a block, at least 1; None: the default.
        rate: Outer learning rate, above 0; None: as `OuterArguments` says.
        momentum: Outer momentum, from 0 to below 1; None: as `OuterArguments` says.
        nesterov: Nesterov's momentum instead of the classical one.
        codec: Encodes a worker's progress in a block; None sends it uncompressed.
    """

    follows_optimizer: ClassVar[bool] = False
    """Whether defaults of rate and momentum depend on the kind of the workers' optimizer."""
    ends_with_global_model: ClassVar[bool]
    """Whether the final model is the global model W_g (BMUF) or the start of the next block (DiLoCo)."""

    def __init__(
        self,
        *,
        period: int | None,
        rate: float | None,
        momentum: float | None,
        nesterov: bool,
        codec: str | Spec | None,
    ) -> None:
        super().__init__(period=period, codec=codec)
        self._arguments = OuterArguments(rate, momentum)
        self._nesterov = nesterov

    @abc.abstractmethod
    def start_block(self) -> None:
        """The replica has just been set to the start of a new block."""

    def attach(self, replica: Replica, comm: Communicator) -> None:
        """Start from the equal parameters that all ranks hold."""
        super().attach(replica, comm)
        rate, momentum = self._arguments.values(is_adaptive=False)
        self.outer = OuterSGD(replica.parameters, rate=rate, momentum=momentum, nesterov=self._nesterov)
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
        is_adaptive = self.follows_optimizer and optimizer_state.is_adaptive(self.replica)
        totals = torch.tensor([weight, float(finishing), float(is_adaptive)], dtype=torch.float64)
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
        # Weighing, dividing, and copying the new start; with a codec also two differences.
        local_work.charge_passes(means, 3 if self._sums is None else 5)
        total, num_finishing, num_adaptive = totals.tolist()
        # Of any rank: one without data has no state yet, and all must make the same step.
        self.outer.rate, self.outer.momentum = self._arguments.values(is_adaptive=num_adaptive > 0)
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
