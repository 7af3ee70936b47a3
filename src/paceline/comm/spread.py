"""A sample of every rank's tensors, to see whether they are the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from paceline.types import Communicator

_MOST = 1 << 10
"""Elements of one tensor."""


def spread_elements(tensors: Sequence[torch.Tensor], comm: Communicator) -> torch.Tensor:
    """Evenly spread elements of the tensors, one row for each rank, in float64. Collective.

    Args:
        tensors: Of real dtypes, of the same shapes on all ranks.
        comm: The ranks.
    """
    parts = [
        flat[:: -(-flat.numel() // _MOST)] for flat in (t.detach().reshape(-1) for t in tensors) if len(flat)
    ]
    own = torch.cat([part.to("cpu", torch.float64) for part in parts]) if parts else torch.zeros(1)
    everyone = own.new_empty(comm.size * own.numel())
    comm.all_gather(everyone, own).wait()
    return everyone.view(comm.size, -1)
