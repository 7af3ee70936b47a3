"""The flat parameters cut into balanced slices, one per shard."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from paceline.errors import ConfigError


class Slices:
    """Shard j holds elements ⌊jT/S⌋ … ⌊(j+1)T/S⌋ of the T elements of all flat buffers together."""

    def __init__(self, buffers: Sequence[torch.Tensor], num_shards: int) -> None:
        total = sum(b.numel() for b in buffers)
        if num_shards > max(1, total):
            raise ConfigError(f"{num_shards} shards for {total} parameters: at most one shard per parameter")
        self._ranges: list[list[tuple[int, int, int]]] = []
        for j in range(num_shards):
            begin, end = j * total // num_shards, (j + 1) * total // num_shards
            ranges, offset = [], 0
            for i, buffer in enumerate(buffers):
                low, high = max(begin, offset), min(end, offset + buffer.numel())
                if low < high:
                    ranges.append((i, low - offset, high - offset))
                offset += buffer.numel()
            self._ranges.append(ranges)

    def of(self, buffers: Sequence[torch.Tensor], shard: int) -> list[torch.Tensor]:
        """Views of `buffers` that belong to `shard`."""
        return [buffers[i][low:high] for i, low, high in self._ranges[shard]]


def home(shard: int, num_shards: int, num_workers: int) -> int:
    """Rank that owns a shard at first: spread evenly."""
    return shard * num_workers // num_shards if num_shards <= num_workers else shard % num_workers


def owner(shard: int, num_shards: int, num_workers: int, lost: set[int]) -> int:
    """Rank that owns a shard now: the first living one from its home on."""
    first = home(shard, num_shards, num_workers)
    return next(r % num_workers for r in range(first, first + num_workers) if r % num_workers not in lost)


def default_shards(model_bytes: int, num_workers: int) -> int:
    """One shard per 256 KiB, at most one per worker: below, messages cost more than a shared load saves."""
    return min(num_workers, max(1, model_bytes // (256 << 10)))
