"""Which rank owns which shard, at first and after deaths."""

from __future__ import annotations

from collections.abc import Collection

from paceline.types import Rank


def home(shard: int, num_shards: int, num_workers: int) -> Rank:
    """Return the rank that owns a shard at first: shards are spread evenly."""
    return shard * num_workers // num_shards if num_shards <= num_workers else shard % num_workers


def owner(shard: int, num_shards: int, num_workers: int, lost: Collection[Rank]) -> Rank:
    """Return the rank that owns a shard now: the first living one from its home on."""
    first = home(shard, num_shards, num_workers)
    return next(r % num_workers for r in range(first, first + num_workers) if r % num_workers not in lost)


def default_shards(model_bytes: int, num_workers: int) -> int:
    """Return one shard per 256 KiB, at most one per worker: smaller ones cost more than they save."""
    return min(num_workers, max(1, model_bytes // (256 << 10)))
