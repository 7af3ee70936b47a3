"""Several tensors as one flat tensor, for messages that carry them together, and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor


def flattened(tensors: Iterable[Tensor]) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Yield a flat copy for each dtype and device, with the tensors that are in it."""
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for group in groups.values():
        yield torch.cat([t.detach().reshape(-1) for t in group]), group


def unflatten(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    """Copy consecutive pieces of `flat` into `tensors`."""
    with torch.no_grad():
        for piece, tensor in zip(torch.split(flat, [t.numel() for t in tensors]), tensors, strict=True):
            tensor.copy_(piece.view(tensor.shape))
