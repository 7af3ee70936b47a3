"""Local SGD (parameter averaging): workers train alone and are averaged every few minibatches.

Source: Zinkevich et al., NIPS 2010; Stich, ICLR 2019.
Every `period` minibatches W ← Σ n_i W_i / Σ n_i, where n_i are the minibatches worker i did in this round
(all equal except in a last, short round). With `average_optimizer` the optimizer's floating-point state is
averaged the same way; step counters become the largest. With period 1, plain SGD and equal batches it is
synchronous SGD.

Cost: the model's bytes once per `period` minibatches.   [tested]
"""

from __future__ import annotations

from typing import Any

import torch

from paceline.codecs.reducers.flat_sums import FlatSums
from paceline.errors import ConfigError
from paceline.spec import Spec
from paceline.strategies.base.strategy import TrainingStrategy
from paceline.strategies.outer import optimizer_state
from paceline.types import Communicator


class LocalSGD(TrainingStrategy):
    """Average the replicas every `period` minibatches; `codec` encodes what each has learned since."""

    advice = "Sends the model once per period: for slow networks. 8 to 16 is usual; far more costs accuracy."
    replicas_differ = True

    def __init__(
        self, *, period: int = 16, average_optimizer: bool = False, codec: str | Spec | None = None
    ) -> None:
        if isinstance(period, bool) or not isinstance(period, int) or period < 1:
            raise ConfigError(f"local_sgd: period={period!r}: a whole number of minibatches >= 1 expected")
        self.period, self.average_optimizer = period, average_optimizer
        self._sums = None if codec is None else FlatSums(codec)
        self._done = self._real = 0  # minibatches since the last average; those on data of this rank's own

    def attach(self, replica: Any, comm: Communicator) -> None:
        """With a codec, progress since the last average is what travels."""
        super().attach(replica, comm)
        self._start: list[torch.Tensor] = []
        if self._sums is not None:
            self._start = [flat.clone() for flat in replica.parameters]
            self._sums.attach(replica.parameters, replica.trained)

    def before_update(self) -> None:
        """A rank without data repeats a batch to keep step: the update must not change anything."""
        if not self.replica.has_samples:
            for parameter in self.replica.trained:
                parameter.grad = None

    def after_update(self) -> None:
        """Count the minibatch; average at the end of a round."""
        self._done += 1
        self._real += int(self.replica.has_samples)
        if self._done >= self.period:
            self._average(finishing=False)

    def update_skipped(self) -> None:
        """A skipped update still took its turn: all ranks average after the same minibatches."""
        self.after_update()

    def synchronize(self) -> None:
        """Close the round; ranks that are still training finish their rounds with this one's weight 0."""
        while not self._average(finishing=True):
            pass

    def consensus(self) -> list[torch.Tensor] | None:
        """The weighted average as it would be now; the model itself before the first minibatch."""
        if self.comm.size == 1:
            return None
        averaged = [flat.clone() for flat in self.replica.parameters]
        self._weighted_mean(averaged, finishing=True)
        return averaged

    def _average(self, *, finishing: bool) -> bool:
        """One round's end; returns whether all ranks are finishing."""
        if self.comm.size == 1:
            self._done = self._real = 0
            return True
        self.replica.adopt()
        tensors = list(self.replica.parameters)
        if self.average_optimizer:
            tensors += [t for _, t in self.replica.optimizer_state() if t.is_floating_point() and t.ndim]
        all_finish = self._weighted_mean(tensors, finishing=finishing, is_round=True)
        if self.average_optimizer:
            optimizer_state.unify_counters(self.replica, self.comm)
        if self._start:
            torch._foreach_copy_(self._start, list(self.replica.parameters))
        self._done = self._real = 0
        return all_finish

    def _weighted_mean(self, tensors: list[torch.Tensor], *, finishing: bool, is_round: bool = False) -> bool:
        """Replace `tensors` by their means over ranks, weighted by minibatches of this round."""
        weight = self._real / self.period  # 1 in a full round: nothing to multiply
        totals = torch.tensor([weight, float(finishing), len(tensors)], dtype=torch.float64)
        works = [self.comm.all_reduce(totals)]
        if self.average_optimizer:
            optimizer_state.check_count(works[0], totals, len(tensors), self.comm)
        if finishing:
            works[0].wait()
            if totals[0] == 0:  # nobody trained since the last average: all hold the same already
                return bool(totals[1] == self.comm.size)
        flats = [t if t.is_contiguous() else t.contiguous() for t in tensors]
        starts = self._start if is_round else []
        if starts:
            torch._foreach_sub_(flats[: len(starts)], starts)
        if weight != 1:
            torch._foreach_mul_(flats, weight)
        works += [self.comm.all_reduce(flat) for flat in flats[len(starts) :]]
        if self._sums is not None and starts:
            self._sums.sum(flats[: len(starts)], self.comm)
        for work in works:
            work.wait()
        total, num_finishing, _ = totals.tolist()
        if starts:
            torch._foreach_add_(flats[: len(starts)], starts, alpha=total)
        for tensor, flat in zip(tensors, flats, strict=True):
            tensor.copy_(flat.div_(total))
        return bool(num_finishing == self.comm.size)

    def state_dict(self) -> dict[str, Any]:
        """Where in the round this rank is."""
        codec = [] if self._sums is None else self._sums.state_dict()
        return {"done": self._done, "real": self._real, "codec": codec, "start": self._start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue in the round."""
        self._done, self._real = state["done"], state["real"]
        if self._sums is not None and state["start"]:
            self._sums.load_state_dict(state["codec"])
            torch._foreach_copy_(self._start, state["start"])

    def stats(self) -> dict[str, Any]:
        """`codec`: its bytes by cause, encode seconds and extra memory on this rank."""
        return {} if self._sums is None else {"codec": self._sums.stats()}

    def traffic(self, model_bytes: int, size: int) -> float:
        """The model once per period, and with `average_optimizer` the optimizer's tensors once more each."""
        if size == 1:
            return 0.0
        state = self.replica.optimizer_state() if self.average_optimizer and hasattr(self, "replica") else ()
        extra: int = sum(t.nbytes for _, t in state if t.is_floating_point() and t.ndim)
        if self._sums is not None:
            model_bytes = int(self._sums.traffic([flat.numel() for flat in self._start], size))
        return (model_bytes + extra) / self.period
