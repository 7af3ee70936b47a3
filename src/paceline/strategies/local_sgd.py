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

from paceline.errors import ConfigError, Mismatch
from paceline.strategies.strategy import TrainingStrategy
from paceline.types import ReduceOp, Work


class LocalSGD(TrainingStrategy):
    """Average the replicas every `period` minibatches."""

    advice = (
        "Sends the model once per period: for slow networks. 8 to 16 is usual; far above 20 costs accuracy."
    )
    replicas_differ = True

    def __init__(self, *, period: int = 16, average_optimizer: bool = False) -> None:
        if isinstance(period, bool) or not isinstance(period, int) or period < 1:
            raise ConfigError(f"local_sgd: period={period!r}: a whole number of minibatches >= 1 expected")
        self.period = period
        self.average_optimizer = average_optimizer
        self._done = 0  # minibatches since the last average …
        self._real = 0  # … and those of them on data of this rank's own

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
        all_finish = self._weighted_mean(tensors, finishing=finishing)
        if self.average_optimizer:
            self._unify_counters()
        self._done = self._real = 0
        return all_finish

    def _weighted_mean(self, tensors: list[torch.Tensor], *, finishing: bool) -> bool:
        """Replace `tensors` by their means over ranks, weighted by minibatches of this round."""
        weight = self._real / self.period  # 1 in a full round: nothing to multiply
        totals = torch.tensor([weight, float(finishing), len(tensors)], dtype=torch.float64)
        works = [self.comm.all_reduce(totals)]
        if self.average_optimizer:
            self._check_states(works[0], totals, len(tensors))
        if finishing:
            works[0].wait()
            if totals[0] == 0:  # nobody trained since the last average: all hold the same already
                return bool(totals[1] == self.comm.size)
        flats = [t if t.is_contiguous() else t.contiguous() for t in tensors]
        for flat in flats:
            if weight != 1:
                flat.mul_(weight)
            works.append(self.comm.all_reduce(flat))
        for work in works:
            work.wait()
        total, num_finishing, _ = totals.tolist()
        for tensor, flat in zip(tensors, flats, strict=True):
            tensor.copy_(flat.div_(total))
        return bool(num_finishing == self.comm.size)

    def _check_states(self, work: Work, totals: torch.Tensor, count: int) -> None:
        work.wait()
        if totals[2] != count * self.comm.size:
            raise Mismatch(
                f"rank {self.comm.rank}: local_sgd(average_optimizer=true): the optimizer has {count}"
                f" tensors of state here and another number elsewhere ({totals[2]:g} in all): a parameter"
                " got no gradient on some rank yet; use average_optimizer=false"
            )

    def _unify_counters(self) -> None:
        counters = [t for _, t in self.replica.optimizer_state() if not (t.is_floating_point() and t.ndim)]
        if counters:
            flat = torch.stack([c.detach().double().reshape(()) for c in counters if c.numel() == 1])
            self.comm.all_reduce(flat, op=ReduceOp.MAX).wait()
            for counter, value in zip([c for c in counters if c.numel() == 1], flat, strict=True):
                counter.fill_(value.item())

    def state_dict(self) -> dict[str, Any]:
        """Where in the round this rank is."""
        return {"done": self._done, "real": self._real}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue in the round."""
        self._done, self._real = state["done"], state["real"]

    def traffic(self, model_bytes: int, size: int) -> float:
        """The model once per period, and with `average_optimizer` the optimizer's tensors once more each."""
        if size == 1:
            return 0.0
        extra = 0
        if self.average_optimizer and hasattr(self, "replica"):
            extra = sum(
                t.nbytes for _, t in self.replica.optimizer_state() if t.is_floating_point() and t.ndim
            )
        return (model_bytes + extra) / self.period
