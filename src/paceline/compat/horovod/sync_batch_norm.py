"""Batch normalisation with statistics over the ranks of a process set."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from paceline.compat.horovod.constants import Sum
from paceline.compat.horovod.differentiable import allreduce
from paceline.compat.horovod.world import ProcessSet, global_process_set


class SyncBatchNorm(_BatchNorm):
    """`nn.BatchNorm` whose training statistics are those of the whole batch over the ranks.

    Sums and counts are reduced, so ranks may have different batch sizes; gradients flow through the
    reduction.
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
        if not use_batch or self.process_set.size() == 1:
            return super().forward(input)
        dims = [0, *range(2, input.dim())]
        count = input.new_tensor([input.numel() / input.shape[1]])
        sums = torch.cat([input.sum(dims), input.square().sum(dims), count])
        sums = allreduce(sums, op=Sum, process_set=self.process_set)
        total, squares, n = sums[: self.num_features], sums[self.num_features : -1], sums[-1]
        mean = total / n
        variance = squares / n - mean.square()
        if self.track_running_stats and self.training:
            self._update(mean.detach(), variance.detach(), n)
        shape = [1, -1, *[1] * (input.dim() - 2)]
        normal = (input - mean.view(shape)) * torch.rsqrt(variance.clamp(min=0) + self.eps).view(shape)
        if self.affine:
            normal = normal * self.weight.view(shape) + self.bias.view(shape)
        return normal

    @torch.no_grad()
    def _update(self, mean: Tensor, variance: Tensor, n: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        factor = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, factor)
        self.running_var.lerp_(variance * (n / (n - 1).clamp(min=1)), factor)
