"""A sample of every rank's tensors, to see whether they are the same."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch

from paceline.types import Communicator

_MOST = 1 << 10
"""Elements of one tensor."""


def spread_elements(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Evenly spread elements of the tensors, in float64 on the CPU.

    Args:
        tensors: Of real dtypes.
    """
    parts = [
        flat[:: -(-len(flat) // _MOST)] for flat in (t.detach().reshape(-1) for t in tensors) if len(flat)
    ]
    return torch.cat([part.to("cpu", torch.float64) for part in parts]) if parts else torch.zeros(1).double()


def of_all_ranks(own: torch.Tensor, comm: Communicator) -> torch.Tensor:
    """One row for each rank; of lost ones that the others go on without, zeros. Collective.

    Args:
        own: Of the same length and dtype on all ranks.
        comm: The ranks.
    """
    everyone = own.new_zeros(comm.size * own.numel())
    comm.all_gather(everyone, own).wait()
    return everyone.view(comm.size, -1)


def are_equal(tensors: Sequence[torch.Tensor], comm: Communicator) -> bool:
    """Whether the tensors are the same on all ranks, as far as evenly spread elements tell. Collective.

    Args:
        tensors: Of real dtypes, of the same shapes on all ranks.
        comm: The ranks.
    """
    rows = of_all_ranks(torch.tensor([zlib.crc32(spread_elements(tensors).numpy().tobytes())]), comm)
    return bool((rows == rows[0]).all())
