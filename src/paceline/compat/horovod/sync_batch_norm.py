"""Batch normalisation with statistics over the ranks of a process set."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from paceline.compat.horovod import operations as o
from paceline.compat.horovod.constants import Sum
from paceline.compat.horovod.world import ProcessSet, global_process_set, members
from paceline.train.modules.shared_statistics import forward


class SyncBatchNorm(_BatchNorm):
    """`nn.BatchNorm` whose training statistics are those of the whole batch over the ranks.

    Ranks may have different batch sizes, also none; gradients flow through the statistics.
    """

    def __init__(self, *args: Any, process_set: ProcessSet = global_process_set, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.process_set = process_set

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `input`, shape [N, C, …]."""
        self._check_input_dim(input)
        use_batch = self.training or self.running_mean is None
        if not use_batch or len(members(self.process_set)) == 1:
            return super().forward(input)
        return forward(self, input, _Members(self.process_set))


class _Members:
    """A process set's ranks: see `shared_statistics.Exchange`."""

    def __init__(self, process_set: ProcessSet) -> None:
        self._set = process_set

    def gather(self, own: Tensor) -> Tensor:
        gathered: Tensor = o.synchronize(o.allgather_async(own[None], process_set=self._set))
        return gathered

    def add_up(self, own: Tensor) -> Tensor:
        total: Tensor = o.synchronize(o.allreduce_async(own, op=Sum, process_set=self._set))
        return total

    def factor(self) -> float:
        return 1.0  # Horovod's ranks count alike
