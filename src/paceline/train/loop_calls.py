"""What a training loop calls between two batches: weights, accumulation, sums of metrics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from paceline.comm.communicator import FabricCommunicator
from paceline.errors import ConfigError
from paceline.train import exchange
from paceline.train.attachment import Attachment
from paceline.train.calls.accumulating import AccumulatingCalls
from paceline.train.calls.batches import BatchCalls
from paceline.train.calls.ranks import RankCalls
from paceline.train.calls.results import ResultCalls
from paceline.train.calls.turns import Turns


class LoopCalls(AccumulatingCalls, BatchCalls, RankCalls, ResultCalls):
    """The part of a job that loops call; it has no state of its own."""

    comm: FabricCommunicator
    attachments: list[Attachment]
    turns: Turns

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes inside only accumulate gradients; the next one outside sends their sum."""
        with ExitStack() as stack:
            for attachment in self.attachments:
                stack.enter_context(attachment.no_sync())
            yield

    def weight(self, count: float | torch.Tensor) -> None:
        """Say what this rank's next loss is a mean over; all ranks call it, before backward.

        For losses that are means over something else than samples: tokens, pixels under a mask, weighted
        samples. The gradient is then exactly that of the mean over all ranks' tokens. It holds until the next
        batch or the next call; with accumulation, call it for each micro-batch. One small all_reduce. A rank
        with count 0 contributes nothing, whatever its loss is; if all have 0, the gradient is 0.

        Methods that do not sum gradients (local SGD and its kin, parameter servers, gossip) train on each
        rank's own mean: nothing is sent, and only a count of 0 matters.

        Args:
            count: Number of tokens, or the sum of their weights, at least 0; a number or a tensor with one.

        Raises:
            ConfigError: It is negative or not finite, or the loss was declared to be a sum.

        Example:
            `job.weight((targets != -100).sum())`
        """
        own = torch.as_tensor(count).detach().to("cpu", torch.float64).reshape(-1)
        if own.numel() != 1 or not (0 <= float(own) < float("inf")):
            raise ConfigError(
                f"rank {self.comm.rank}: job.weight({count!r}): one number of at least 0 expected"
            )
        if any(a.weights.is_sum for a in self.attachments):
            raise ConfigError(
                "job.weight: prepare(..., loss_reduction='sum') says that the loss is a sum, which needs no"
                " count; leave out one of the two"
            )
        if self.attachments and all(a.weights.repeats for a in self.attachments):
            own.zero_()
        every = own.clone()
        if self.comm.size > 1 and any(a.reduces_gradients for a in self.attachments):
            self.comm.all_reduce(every).wait()
        for attachment in self.attachments:
            attachment.weigh(float(own), float(every))

    def clip_grad_norm_(
        self, parameters: torch.Tensor | Iterable[torch.Tensor], max_norm: float, norm_type: float = 2.0
    ) -> torch.Tensor:
        """As `torch.nn.utils.clip_grad_norm_`, also before the step that closes a short window.

        A window with fewer backward passes than `accumulation_steps`, without a loader that says so, is
        otherwise reduced in `step`, after the clipping. All ranks call it.

        Args:
            parameters: Those of prepared models, or others.
            max_norm: Largest norm of all their gradients together.
            norm_type: Which norm; default 2.

        Returns:
            The norm before clipping, equal on all ranks where gradients are summed.

        Raises:
            ConfigError: In `job.accumulate`, before the end of the window.
        """
        listed = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        given = {id(p) for p in listed}
        for attachment in self.attachments:
            if any(id(p) in given for p in attachment.replica.trained):
                if attachment.holds_back:
                    raise ConfigError(
                        f"rank {self.comm.rank}: job.clip_grad_norm_ in the middle of a window of"
                        " job.accumulate, whose gradients are not complete; write `if job.sync_gradients:`"
                        " before it"
                    )
                attachment.complete()
        return nn.utils.clip_grad_norm_(listed, max_norm, norm_type)

    def all_reduce_metrics(self, values: Mapping[str, Any]) -> dict[str, float]:
        """Combine the metrics of all ranks; every rank gets the same result.

        Args:
            values: Names and (sum, count) pairs, which become Σ sum / Σ count; plain numbers are added up.
        """
        with self.turns.meeting():
            return exchange.all_reduce_metrics(values, self.comm)

    def gather_objects(self, value: object) -> list[Any]:
        """Every rank's value, in rank order; nothing is pickled.

        Args:
            value: Numbers, strings, lists, dicts and tensors.
        """
        with self.turns.meeting():
            return exchange.gather_objects(value, self.comm)
