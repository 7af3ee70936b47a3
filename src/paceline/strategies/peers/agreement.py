"""One model out of replicas that differ by updates that are on their way."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from paceline.types import Communicator


def mean_with_residuals(
    comm: Communicator, flats: Sequence[torch.Tensor], residuals: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Return the mean of the living ranks' `flats` plus the sum of their `residuals`, alike on all ranks."""
    count = torch.ones(1, dtype=torch.float64)
    means = [flat.double() for flat in flats]
    sums = [residual.double() for residual in residuals]
    for work in [comm.all_reduce(t) for t in [count, *means, *sums]]:
        work.wait()
    rows = zip(means, sums, flats, strict=True)
    return [(mean / count.item() + residual).to(flat.dtype) for mean, residual, flat in rows]
