"""Sums of a model's flat buffers with one codec: what periodic methods need for their pseudo-gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from paceline.codecs.kernel import ledger
from paceline.codecs.reducers.reducer import Layout, Reducer, finish
from paceline.types import Communicator


class FlatSums:
    """One reducer, and one state per flat buffer of a model."""

    def __init__(self, reducer: Reducer) -> None:
        self._reducer = reducer
        self._states: list[dict[str, Any]] = []
        self._layouts: list[Layout] = []

    def attach(self, flats: Sequence[torch.Tensor], parameters: Sequence[torch.Tensor]) -> None:
        """Note where each of `parameters` lies in `flats`, for codecs that need shapes."""
        self._states = [{} for _ in flats]
        parameters = [torch.view_as_real(p.detach()) if p.is_complex() else p for p in parameters]
        self._layouts = [
            [
                (int(p.storage_offset()) - int(flat.storage_offset()), p.shape)
                for p in parameters
                if p.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
            ]
            for flat in flats
        ]

    def sum(self, tensors: Sequence[torch.Tensor], comm: Communicator) -> None:
        """Replace each tensor, shaped like its flat buffer, by its sum over ranks; equal bits everywhere."""
        flats = [tensor.to(torch.float32) for tensor in tensors]  # themselves, if they are float32
        for i, state in enumerate(self._states):
            state["tensor"] = i
        works = [
            self._reducer.start(flat, layout, comm, state)
            for flat, layout, state in zip(flats, self._layouts, self._states, strict=True)
        ]
        finish(works)
        for tensor, flat in zip(tensors, flats, strict=True):
            if tensor.data_ptr() != flat.data_ptr():
                tensor.copy_(flat)

    def stats(self) -> dict[str, float]:
        """Bytes by cause, encode seconds and extra memory of all buffers."""
        return ledger.total(self._reducer.stats(state) for state in self._states)

    def state_dict(self) -> list[dict[str, Any]]:
        """Residuals and factors, per buffer."""
        return self._states

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Continue from what `state_dict()` returned; an empty list keeps the states as they are."""
        self._states = list(states) or self._states

    def traffic(self, numels: Sequence[int], size: int) -> float:
        """Claimed bytes that a rank hands over for one sum of all buffers."""
        pairs = zip(numels, self._layouts, strict=True)
        return sum(self._reducer.traffic(numel, layout, size) for numel, layout in pairs)
