"""Local SGD (parameter averaging): workers train alone and are averaged every few minibatches.

Every `period` minibatches W ← Σ n_i W_i / Σ n_i, where n_i are the minibatches worker i did in this round
(all equal except in a last, short round). With period 1, plain SGD and equal batches it is synchronous SGD.

Cost: the model's bytes once per `period` minibatches.   [tested]
"""

from __future__ import annotations

from typing import Any

import torch

from paceline import local_work
from paceline.comm.spread import are_equal
from paceline.spec import Spec
from paceline.strategies.base.periodic import AveragingStrategy
from paceline.strategies.outer import optimizer_state
from paceline.types import Communicator, Replica


class LocalSGD(AveragingStrategy):
    """Average the replicas every `period` minibatches.

    Args:
        period: Minibatches between two averages, at least 1; default 16; if a thirtieth of the run, or four
            times the samples of a worker's minibatch, is less, then that (`job.epochs` knows both). A
            larger one sends less; replicas then drift further apart, which costs accuracy. 8 to 16 is usual.
        average_optimizer: Also average the optimizer's floating-point state (momentum, Adam's moments); step
            counters become the largest. Default false: every worker keeps its own. It costs as many bytes
            again per state tensor; try it when loss jumps after every average.
        codec: Encodes what a worker has learned since the last average, e.g. `error_feedback(codec=onebit)`;
            default none. For networks on which one model per period is still too much.

    Raises:
        ConfigError: A period below 1, or a codec that does not exist.
        Mismatch: With `average_optimizer`, ranks have different numbers of state tensors.

    Example:
        `local_sgd(period=8, codec=int8)`

    Source: Zinkevich et al., NIPS 2010; Stich, ICLR 2019.
    """

    advice = "For slow networks: sends the model once per period, usually 8 to 16; more costs accuracy."

    def __init__(
        self, *, period: int | None = None, average_optimizer: bool = False, codec: str | Spec | None = None
    ) -> None:
        super().__init__(period=period, codec=codec)
        self.average_optimizer = average_optimizer

    def attach(self, replica: Replica, comm: Communicator) -> None:
        super().attach(replica, comm)
        self._start: list[torch.Tensor] = []
        """With a codec: the parameters after the last average; progress since then is what travels."""
        if self._sums is not None:
            self._start = [flat.clone() for flat in replica.parameters]
            self._sums.attach(replica.parameters, replica.trained)

    def before_update(self) -> None:
        """Drop the gradients of a repeated batch: neither parameters nor momentum may change."""
        if not self.replica.has_samples:
            for parameter in self.replica.trained:
                parameter.grad = None

    def consensus(self) -> list[torch.Tensor] | None:
        """The weighted average as it would be now; the model itself before the first minibatch."""
        if self.comm.size == 1:
            return None
        averaged = [flat.clone() for flat in self.replica.parameters]
        self._average(averaged, starts=[], finishing=True)
        return averaged

    def close_round(self, *, finishing: bool) -> bool:
        if self.comm.size == 1:
            return True
        self.replica.adopt()
        tensors = list(self.replica.parameters)
        if self.average_optimizer:
            tensors += optimizer_state.averaged_tensors(self.replica)
        all_finish = self._average(tensors, starts=self._start, finishing=finishing)
        if self.average_optimizer:
            optimizer_state.unify_counters(self.replica, self.comm)
        if self._start:
            torch._foreach_copy_(self._start, list(self.replica.parameters))
        return all_finish

    def _average(self, tensors: list[torch.Tensor], *, starts: list[torch.Tensor], finishing: bool) -> bool:
        """Replace `tensors` by their means over ranks, weighted by the minibatches of this round.

        `starts` are the values from which the first `len(starts)` tensors are encoded as differences.
        Returns whether all ranks are finishing.
        """
        weight = self._real / self.period  # 1 in a full round: nothing to multiply
        totals = torch.tensor([weight, float(finishing), len(tensors)], dtype=torch.float64)
        works = [self.comm.all_reduce(totals)]
        if self.average_optimizer:
            optimizer_state.check_count(works[0], totals, len(tensors), self.comm)
        if finishing:
            works[0].wait()
            if totals[0] == 0 and totals[1] == self.comm.size:  # no rank trained since the last average
                if are_equal(tensors, self.comm):
                    return True
                weight, totals[0] = 1.0, self.comm.size  # what the loop itself has changed since: Lookahead
        flats = [tensor.contiguous() if weight else tensor.clone() for tensor in tensors]
        encoded, plain = flats[: len(starts)], flats[len(starts) :]
        # Dividing; with a codec also both differences and the copy of the new start.
        local_work.charge_passes(flats, 1)
        local_work.charge_passes(encoded, 3)
        if encoded:
            torch._foreach_sub_(encoded, starts)
        if weight != 1:
            torch._foreach_mul_(flats, weight)
        works += [self.comm.all_reduce(flat) for flat in plain]
        if self._sums is not None and encoded:
            self._sums.sum(encoded, self.comm)
        for work in works:
            work.wait()
        total, num_finishing, _ = totals.tolist()
        if total == 0:  # ranks that still train, on no samples of their own in this round
            return False
        if encoded:
            torch._foreach_add_(encoded, starts, alpha=total)
        for tensor, flat in zip(tensors, flats, strict=True):
            tensor.copy_(flat.div_(total))
        return bool(num_finishing == self.comm.size)

    def state_dict(self) -> dict[str, Any]:
        """Where in the round this rank is, and the codec's residuals."""
        codec = [] if self._sums is None else self._sums.state_dict()
        return {"done": self._done, "real": self._real, "codec": codec, "start": self._start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._done, self._real = state["done"], state["real"]
        if self._sums is not None and state["start"]:
            self._sums.load_state_dict(state["codec"])
            torch._foreach_copy_(self._start, state["start"])

    def traffic(self, model_bytes: int, size: int) -> float:
        """The model once per period, and with `average_optimizer` the optimizer's tensors once more each."""
        if size == 1:
            return 0.0
        sent: float = model_bytes
        if self._sums is not None:
            sent = int(self._sums.traffic([flat.numel() for flat in self._start], size))
        if self.average_optimizer and hasattr(self, "replica"):
            sent += sum(t.nbytes for t in optimizer_state.averaged_tensors(self.replica))
        return sent / self.period
