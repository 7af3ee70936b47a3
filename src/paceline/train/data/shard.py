"""Which loader stands in for the user's DataLoader."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from paceline.errors import ConfigError
from paceline.train.data.batch_sizes import BatchSizeOf, Measured
from paceline.train.data.fingerprint import UNKNOWN, check_same, dataset_digest, digest
from paceline.train.data.loader import ShardedLoader
from paceline.train.data.map_loader import MapLoader
from paceline.train.data.streams import OwnLoader, StreamLoader
from paceline.types import Communicator

_OWN_DATA = (
    "All ranks must give the same data, which is then divided: seed splits and shuffles alike, for example"
    " with paceline.init(seed=0). Where each rank has data of its own, pass shard=False to prepare()"
)


def shard(
    source: Any,
    comm: Communicator,
    *,
    seed: int,
    per_worker: bool,
    divided: bool,
    batch_size_of: BatchSizeOf | None = None,
) -> ShardedLoader:
    """The loader that hands rank `comm.rank` its share of `source`.

    Raises:
        ConfigError: It cannot be divided.
        Mismatch: Ranks give other data.
    """
    if not isinstance(source, DataLoader):
        raise ConfigError(f"prepare() takes a torch.utils.data.DataLoader, got {type(source).__name__}")
    measured = Measured(batch_size_of, must_be_sure=comm.size > 1)
    if not divided:
        return OwnLoader(source, comm, seed=seed, batch_size_of=measured)
    if type(source).__iter__ is not DataLoader.__iter__:
        raise ConfigError(
            f"{type(source).__name__} replaces DataLoader.__iter__, so its samples cannot be divided from"
            " outside; shard inside it and pass shard=False to prepare()"
        )
    if comm.size > 1:
        _check_same(source, comm)
    loader: ShardedLoader
    if isinstance(source.dataset, IterableDataset):
        loader = StreamLoader(source, comm, seed=seed, per_worker=per_worker, batch_size_of=measured)
    else:
        loader = MapLoader(source, comm, seed=seed, per_worker=per_worker)
    if comm.size > 1:
        loader.measured = measured
    return loader


def _check_same(source: DataLoader[Any], comm: Communicator) -> None:
    """Of a stream only the settings are compared: reading it may have effects."""
    samplers = [type(one).__name__ for one in (source.sampler, source.batch_sampler)]
    facts = digest([type(source.dataset).__name__, samplers, source.batch_size, source.drop_last])
    check_same(
        "the DataLoader (kinds of data set and samplers, batch_size, drop_last)", facts, comm, _OWN_DATA
    )
    if not isinstance(source.dataset, IterableDataset):
        own = dataset_digest(source.dataset, may_fetch=source.num_workers == 0, columns=True)
        check_same("the data set (its length or samples)", own or UNKNOWN, comm, _OWN_DATA)
