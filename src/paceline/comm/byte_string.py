"""Bytes of any length from rank 0 to all ranks: the others need not know the length."""

from __future__ import annotations

import torch

from paceline.types import Communicator


def broadcast(data: torch.Tensor, comm: Communicator) -> torch.Tensor:
    """Rank 0's `data`, a uint8 tensor [num_bytes], on every rank; what the others pass is not looked at."""
    length = torch.tensor([data.numel()])
    comm.broadcast(length).wait()
    if comm.rank > 0:
        data = torch.empty(int(length), dtype=torch.uint8)
    if data.numel():
        comm.broadcast(data).wait()
    return data
