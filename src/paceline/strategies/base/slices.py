"""The flat parameters cut into balanced slices: shards of a server, fragments of Streaming DiLoCo."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from paceline.errors import ConfigError


class Slices:
    """Slice j holds elements ⌊jT/S⌋ … ⌊(j+1)T/S⌋ of the T elements of all flat buffers together."""

    def __init__(self, buffers: Sequence[torch.Tensor], num_slices: int, *, what: str) -> None:
        """Cut `buffers` (1-D) into `num_slices`; ConfigError, which calls them `what`, if one is empty."""
        total = sum(b.numel() for b in buffers)
        if num_slices > max(1, total):
            raise ConfigError(
                f"{num_slices} {what}s for {total} parameters: at most one {what} per parameter"
            )
        self._ranges: list[list[tuple[int, int, int]]] = []
        for j in range(num_slices):
            begin, end = j * total // num_slices, (j + 1) * total // num_slices
            ranges, offset = [], 0
            for i, buffer in enumerate(buffers):
                low, high = max(begin, offset), min(end, offset + buffer.numel())
                if low < high:
                    ranges.append((i, low - offset, high - offset))
                offset += buffer.numel()
            self._ranges.append(ranges)

    def __len__(self) -> int:
        return len(self._ranges)

    def of(self, buffers: Sequence[torch.Tensor], index: int) -> list[torch.Tensor]:
        """Views of `buffers`, shaped like those cut, that belong to slice `index`."""
        return [buffers[i][low:high] for i, low, high in self._ranges[index]]
