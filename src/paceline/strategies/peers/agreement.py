"""One model out of replicas that differ by what is on its way."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from paceline.types import Communicator


def mean_with_residuals(
    comm: Communicator, flats: Sequence[torch.Tensor], residuals: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """The mean of the living ranks' `flats` plus the sum of their `residuals`; equal bits everywhere."""
    count, means = torch.ones(1, dtype=torch.float64), [flat.double() for flat in flats]
    left = [residual.double() for residual in residuals]
    for work in [comm.all_reduce(t) for t in [count, *means, *left]]:
        work.wait()
    every = zip(means, left, flats, strict=True)
    return [(mean / count.item() + rest).to(flat.dtype) for mean, rest, flat in every]
