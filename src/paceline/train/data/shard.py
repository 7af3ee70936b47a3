"""Which loader stands in for the user's DataLoader."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from paceline.errors import ConfigError
from paceline.train.data.loader import ShardedLoader
from paceline.train.data.map_loader import MapLoader
from paceline.train.data.streams import OwnLoader, StreamLoader
from paceline.types import Communicator


def shard(source: Any, comm: Communicator, *, seed: int, per_worker: bool, divided: bool) -> ShardedLoader:
    """The loader that hands rank `comm.rank` its share of `source`. ConfigError if it cannot be."""
    if not isinstance(source, DataLoader):
        raise ConfigError(f"prepare() takes a torch.utils.data.DataLoader, got {type(source).__name__}")
    if type(source).__iter__ is not DataLoader.__iter__:
        raise ConfigError(
            f"{type(source).__name__} replaces DataLoader.__iter__, so its samples cannot be divided from"
            " outside; shard inside it and pass shard=False to prepare()"
        )
    if not divided:
        return OwnLoader(source, comm, seed=seed)
    if isinstance(source.dataset, IterableDataset):
        return StreamLoader(source, comm, seed=seed)
    return MapLoader(source, comm, seed=seed, per_worker=per_worker)
